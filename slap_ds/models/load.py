"""Models and tokenizers from folders, hub names or a bare config.

Under ZeRO-3 the caller keeps transformers' `HfDeepSpeedConfig` alive while `load_model` runs;
transformers then partitions the weights as it creates them.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import slap_ds.models.attention  # noqa: F401  (registers the "packed" attention)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Their blocks put the sliding window into the mask alone, which only sdpa and eager read.
_WINDOW_IN_MASK = frozenset({"phimoe"})
# Read of every config that has them, though few config classes declare both.
_READ_ANYWAY = frozenset({"head_dim", "max_position_embeddings"})
# They have is_decoder False, and never look at it or set it themselves.
_CAUSAL_ANYWAY = frozenset({"gpt_neox", "gpt_neox_japanese", "trocr"})
# The setting that makes other architectures causal.
_CAUSAL_IF: dict[str, tuple[str, Any]] = {"xlm": ("causal", True), "xlnet": ("attn_type", "uni")}
DEMO_TOKENIZER = Path(__file__).parent.parent / "data" / "demo"


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer from a folder, a hub name, a tokenizer.json, or `builtin:demo`.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: what is there is no tokenizer.
    """
    path = DEMO_TOKENIZER if name == "builtin:demo" else Path(name)
    if path.is_file():
        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:
            raise ValueError(f"model.tokenizer: {path} is no tokenizer.json: {error}") from None
    if _looks_local(name) and not path.exists():
        raise FileNotFoundError(f"model.tokenizer: no file or folder at {name!r}")
    source = str(path) if path.exists() else name
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model.tokenizer: no tokenizer from {name!r}: {first}") from None


def load_config(path: str | None, fields: Mapping[str, Any] | None) -> Any:
    """The transformers config of a model to be loaded (`path`) or made fresh (`fields`).

    Raises:
        ValueError, FileNotFoundError: as `load_tokenizer`; fields that the architecture does not
            have or accept, or one that is no causal language model.
    """
    if path is not None:
        config = _saved_config(path)
        _check_causal(config)
        return config
    assert fields is not None
    config = _fresh_config(fields)
    # First, for fields of a decoder mean nothing to an encoder.
    _check_causal(config)
    if unknown := list(_unknown_fields(config, fields, "model.config.")):
        raise ValueError("; ".join(unknown))
    return config


def _saved_config(path: str) -> Any:
    if _looks_local(path) and not Path(path).exists():
        raise FileNotFoundError(f"model.path: no model folder at {path!r}")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path: no model from {path!r}: {first}") from None


def _fresh_config(fields: Mapping[str, Any]) -> Any:
    settings = dict(fields)
    kind = settings.pop("model_type", None)
    if kind is None:
        raise ValueError("model.config has no model_type (llama, glm, qwen2, mistral, ...)")
    if str(kind) not in CONFIG_MAPPING:
        hint = _nearest(kind, CONFIG_MAPPING) or "expected llama, glm, qwen2, mistral, ..."
        raise ValueError(f"model.config: transformers has no model_type {kind!r}; {hint}")
    try:
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:  # of many types: each config class checks its fields its own way
        # The last line has the cause, those before it the name of a validator.
        cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        cause = cause.strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
        raise ValueError(f"model.config: {kind} does not accept these values: {cause}") from None


def _unknown_fields(config: Any, settings: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A line for each of `settings` that no model would read."""
    known = {field.name for field in dataclasses.fields(config)}
    known |= {"model_type", *(config.attribute_map or {}), *_READ_ANYWAY}
    source = inspect.getsource(sys.modules[type(config).__module__])
    for key, value in settings.items():
        # Older names of fields are taken up under the new ones, by code that names them; what
        # nobody takes up is kept as it is.
        if key not in known and key in vars(config) and f'"{key}"' not in source:
            hint = _nearest(key, known) or "leave it out"
            yield f"{prefix}{key}: {config.model_type} has no such field; {hint}"
        part = getattr(config, key, None)
        if isinstance(value, Mapping) and isinstance(part, PreTrainedConfig):
            yield from _unknown_fields(part, value, f"{prefix}{key}.")


def _nearest(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _check_causal(config: Any) -> None:
    """Refuse what is no language model, or one whose tokens see those after them: the answers."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has no causal language model of model_type {config.model_type}: take "
            "another, such as llama, glm, qwen2 or mistral"
        )
    text = config.get_text_config()
    kind, remedy = text.model_type, ""
    # Read where the class declares it; a saved config of another kind may hold a meaningless one.
    encodes = getattr(type(text), "is_decoder", None) is False and not text.is_decoder
    # The decoder classes of encoder-decoders set is_decoder themselves.
    if encodes and kind not in _CAUSAL_ANYWAY and not config.is_encoder_decoder:
        remedy = "set is_decoder: true in its config"
    if kind in _CAUSAL_IF:
        name, value = _CAUSAL_IF[kind]
        if getattr(text, name) != value:
            remedy = f"set {name}: {str(value).lower()} in its config"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        remedy = "set use_bidirectional_attention: null in its config"
    if kind == "cpmant":
        remedy = "it has no setting against that"
    if remedy:
        raise ValueError(
            f"{kind} lets tokens see those after them, so it would be trained with the answers in "
            f"sight: {remedy}, or take a decoder-only model such as llama, glm, qwen2 or mistral"
        )


def check_fit(model_config: Any, tokenizer: Any, max_tokens: int) -> None:
    """Refuse a tokenizer or sample length the model has no embeddings for.

    Raises:
        ValueError: the tokenizer's largest id does not fit into the vocabulary, or samples may be
            longer than the model's positions.
    """
    largest = max(tokenizer.get_vocab().values())
    vocab = model_config.get_text_config().vocab_size
    if largest >= vocab:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model's vocabulary ends at {vocab - 1}: "
            f"use the model's own tokenizer, or a model.config with vocab_size > {largest}"
        )
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise ValueError(
            f"data.max_tokens is {max_tokens}, the model has {positions} positions: lower it"
        )


def check_window(model_config: Any, attention: str, max_tokens: int) -> None:
    """Refuse an attention that would not see the sliding window of this architecture, or has no
    mask where the architecture chooses by it what to attend to.

    Raises:
        ValueError: samples may be longer than such a window; attention is sparse (GLM-5).
    """
    text = model_config.get_text_config()
    if attention == "packed" and getattr(text, "index_topk", None):
        raise ValueError(
            f"{text.model_type} chooses the tokens that it attends to by a mask, which "
            "model.attention packed has not: use model.attention sdpa"
        )
    window = getattr(text, "sliding_window", None)
    if text.model_type not in _WINDOW_IN_MASK or attention in ("sdpa", "eager"):
        return
    if window is not None and window < max_tokens:
        raise ValueError(
            f"{text.model_type} has attention windows of {window} tokens, which model.attention "
            f"{attention} does not see, and data.max_tokens is {max_tokens}: use model.attention "
            f"sdpa, or data.max_tokens up to {window}"
        )


def load_model(
    path: str | None, model_config: Any, *, dtype: str, attention: str, seed: int
) -> torch.nn.Module:
    """The causal language model, from weights (`path`) or fresh from its config.

    Fresh weights depend on `seed`, not on the rank or the number of ranks, and on whether ZeRO-3
    partitions them meanwhile: transformers then initialises in another order, so that they differ
    from those of ZeRO 0 to 2 and of the torch engine.

    Raises:
        ValueError: the architecture does not have this attention, its package is not installed, or
            `path` holds no whole safetensors files with all of this model's weights.
    """
    model_config.use_cache = False
    torch.manual_seed(seed)
    settings = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    model: torch.nn.Module
    try:
        if path is not None:
            # A pickled model (.bin) could run code while it is read; safetensors cannot.
            with whole_files("model.path", path):
                model, found = AutoModelForCausalLM.from_pretrained(
                    path,
                    config=model_config,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **settings,
                )
            _check_all_loaded(path, found)
        else:
            model = AutoModelForCausalLM.from_config(model_config, **settings)
    except ImportError as error:
        first = (str(error).strip().splitlines() or ["a package is missing"])[0]
        raise ValueError(
            f"{model_config.model_type} with model.attention {attention!r} needs a package that "
            f"cannot be used here: {first} Install it, or try packed, sdpa or eager"
        ) from None
    except (KeyError, ValueError) as error:
        # Architectures with attention classes of their own look the name up in a dict.
        about = ("attention implementation", "attn_implementation")
        if error.args != (attention,) and not any(words in str(error) for words in about):
            if path is not None:
                raise
            raise ValueError(
                f"model.config: {model_config.model_type} cannot be built with these values: "
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            ) from None
        raise ValueError(
            f"model.attention is {attention!r}, which {model_config.model_type} does not have: try "
            "packed, sdpa or eager"
        ) from None
    return model


def check_weights(path: str) -> bool:
    """Whether the weights of the model at `path` are on this machine, without reading them.

    False: a hub's name, and they will be fetched.

    Raises:
        ValueError: a folder without whole safetensors files.
    """
    folder = Path(path)
    if not folder.is_dir():
        either = ("model.safetensors", "model.safetensors.index.json")
        return any(isinstance(try_to_load_from_cache(path, name), str) for name in either)
    index = folder / "model.safetensors.index.json"
    with whole_files("model.path", path):
        names = {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        if lost := sorted(name for name in names if not (folder / name).is_file()):
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ValueError(
                f"model.path: {path!r} has no {lost[0]}{more}: copy or download the model's "
                "safetensors files too (pickled .bin files are not read)"
            )
        for name in sorted(names):
            with safe_open(folder / name, "pt"):  # its header says how long the file must be
                pass
    return True


def _check_all_loaded(path: str, found: Mapping[str, Any]) -> None:
    """transformers gives what it does not find fresh random values, with no more than a warning.

    Raises:
        ValueError: weights are missing in the files.
    """
    if lost := sorted(found["missing_keys"]):
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"model.path: the files at {path!r} lack {', '.join(lost[:3])}{more}: copy, download "
            "or export the model again; a model without its output head cannot be trained here"
        )


@contextmanager
def whole_files(what: str, path: str) -> Iterator[None]:
    """Reading the weights of the model at `path`, which `what` names.

    Raises:
        ValueError: there are none in safetensors files, or a file is cut off or damaged.
    """
    try:
        yield
    except OSError as error:
        first = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise ValueError(f"{what}: no model in safetensors files at {path!r}: {first}") from None
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(
            f"{what}: the weights at {path!r} have other shapes than its config.json says: they "
            "are of another model"
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"{what}: a safetensors file at {path!r} is cut off or damaged ({error}): copy, "
            "download or export it again"
        ) from None


def _looks_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith(".json")
