"""Models and tokenizers from folders, hub names or a bare config.

Under ZeRO-3 the caller keeps transformers' `HfDeepSpeedConfig` alive while `load_model` runs;
transformers then partitions the weights as it creates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import slap_ds.models.attention  # noqa: F401  (registers the "packed" attention)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Their blocks put the sliding window into the mask alone, which only sdpa and eager read.
_WINDOW_IN_MASK = frozenset({"phimoe"})
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
        ValueError, FileNotFoundError: as `load_tokenizer`.
    """
    if path is not None:
        if _looks_local(path) and not Path(path).exists():
            raise FileNotFoundError(f"model.path: no model folder at {path!r}")
        try:
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"model.path: no model from {path!r}: {first}") from None
    assert fields is not None
    settings = dict(fields)
    kind = settings.pop("model_type", None)
    if kind is None:
        raise ValueError("model.config has no model_type (llama, glm, qwen2, mistral, ...)")
    try:
        return AutoConfig.for_model(kind, **settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.config: {str(error).strip().splitlines()[0]}") from None


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
    """Refuse an attention that would not see the sliding window of this architecture.

    Raises:
        ValueError: samples may be longer than such a window.
    """
    text = model_config.get_text_config()
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

    Fresh weights depend on `seed` alone, so that every rank and world size starts the same.

    Raises:
        ValueError: the architecture does not have this attention, or `path` no safetensors files.
    """
    model_config.use_cache = False
    torch.manual_seed(seed)
    settings = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    model: torch.nn.Module
    try:
        if path is not None:
            # A pickled model (.bin) could run code while it is read; safetensors cannot.
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=model_config,
                use_safetensors=True,
                trust_remote_code=False,
                **settings,
            )
        else:
            model = AutoModelForCausalLM.from_config(model_config, **settings)
    except OSError as error:
        first = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise ValueError(
            f"model.path: no weights in safetensors files at {path!r}: {first}"
        ) from None
    except (KeyError, ValueError) as error:
        # Architectures with attention classes of their own look the name up in a dict.
        if error.args != (attention,) and "attention implementation" not in str(error):
            raise
        raise ValueError(
            f"model.attention is {attention!r}, which {model_config.model_type} does not have: try "
            "packed, sdpa or eager"
        ) from None
    return model


def _looks_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith(".json")
