"""LoRA, DoRA and rsLoRA through peft: small trained matrices beside frozen weights.

    load_model -> add_adapter -> engine -> checkpoint (of the adapter alone)
    checkpoint -> with_adapter -> save_pretrained, peft's own format
                               -> merged, a model without peft

peft's layers are put into the transformers model itself, without peft's wrapper around it. Head,
blocks and forward reuse are found where they always are, and all of them see the adapted model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slap_ds.config.schema import LoraConfig

_NAME = "default"  # peft's name of the one adapter
_PREFIX = "base_model.model."  # what peft's wrapper puts before names


def add_adapter(lm: Any, settings: LoraConfig, seed: int) -> None:
    """Freeze `lm` and put a trained adapter into it; fresh ones depend on `seed` alone.

    Raises:
        ValueError: peft is not installed, a target does not exist, or it is the output embedding.
        FileNotFoundError, ValueError: `start` is no adapter folder, or one of another model.
    """
    peft = _peft()
    torch.manual_seed(seed)
    try:
        peft.inject_adapter_in_model(peft_config(settings), lm, _NAME)
    except ValueError as error:
        raise ValueError(_about_targets(lm, settings, error)) from None
    if not isinstance(lm.get_output_embeddings(), nn.Linear):
        whose = "target_modules" if settings.start is None else f"start: {settings.start!r}"
        raise ValueError(
            f"model.lora.{whose} adapts the output embedding, whose loss and curvature are in "
            "closed form: adapt layers inside the blocks"
        )
    tied = bool(lm.config.get_text_config().tie_word_embeddings)
    if tied and type(lm.get_input_embeddings()).__module__.startswith("peft."):
        whose = "target_modules" if settings.start is None else f"start: {settings.start!r}"
        raise ValueError(
            f"model.lora.{whose} adapts the input embedding, which this model uses as its output "
            "embedding too: merged, the adapter would change both; adapt layers inside the blocks"
        )
    if settings.start is not None:
        weights = peft.load_peft_weights(settings.start, device="cpu")
        inner = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
        try:
            found = peft.set_peft_model_state_dict(lm, inner, _NAME)
        except RuntimeError as error:
            raise ValueError(f"model.lora.start: {_last_line(error)}") from None
        _check_all_there(lm, [*_unprefixed(inner)], found.unexpected_keys, settings.start)
    # The first block's input must carry a gradient, or checkpointing it stops the backward there.
    lm.enable_input_require_grads()


def peft_config(settings: LoraConfig) -> Any:
    """peft's own configuration; that of `start` decides about everything but the dropout.

    Raises:
        FileNotFoundError: `start` holds no adapter_config.json.
    """
    peft = _peft()
    if settings.start is not None:
        if not (Path(settings.start) / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"model.lora.start: no adapter_config.json in {settings.start!r}: name a folder "
                "that peft or slap-ds export wrote"
            )
        found = peft.PeftConfig.from_pretrained(settings.start)
        if not isinstance(found, peft.LoraConfig):
            raise ValueError(
                f"model.lora.start: {settings.start!r} holds a {found.peft_type.value} adapter, "
                "expected LORA"
            )
        found.inference_mode = False
        found.lora_dropout = settings.dropout
        return found
    return peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or "all-linear",
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        task_type="CAUSAL_LM",
    )


def with_adapter(
    lm: Any, settings: LoraConfig, weights: Mapping[str, Tensor], base: str | None
) -> Any:
    """peft's model around `lm` (which may lie on the meta device) with trained adapter weights.

    Args:
        weights: by the names that the model has after `add_adapter`. base: the base model's path,
            as adapter_config.json will name it.

    Raises:
        ValueError: the weights are not those of this adapter.
    """
    config = peft_config(settings)
    config.base_model_name_or_path = base
    on_meta = next(lm.parameters()).is_meta
    model = _peft().get_peft_model(
        lm, config, autocast_adapter_dtype=False, low_cpu_mem_usage=on_meta
    )
    problem = lm.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in problem.missing_keys if _is_adapter(name)]
    if missing or problem.unexpected_keys:
        raise ValueError(
            f"the checkpoint does not fit model.lora: missing {missing[:3]}, unknown "
            f"{problem.unexpected_keys[:3]}"
        )
    return model


def load_adapted(folder: Path) -> Any:
    """peft's model of an adapter folder, around its base model.

    transformers' own `from_pretrained` reads such folders too, but loses DoRA's magnitudes (5.23).
    """
    return _peft().AutoPeftModelForCausalLM.from_pretrained(folder)


def merged(model: Any) -> Any:
    """The transformers model with the adapter added into its weights, in float32 before rounding.

    Args:
        model: from `with_adapter`, on a real device. It is used up.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            # A layer, or one parameter of a block of experts.
            whole = layer.get_param() if hasattr(layer, "get_param") else None
            dtype = (layer.get_base_layer().weight if whole is None else whole).dtype
            layer.float()
            layer.merge(safe_merge=True)
            layer.to(dtype)
    return model.unload()


def logits_of(model: Any) -> Tensor:
    """Log-probabilities (t, V) float32 that a model gives to a few tokens, by the way that peft
    applies adapters."""
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 17) * 7919 % vocab
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def check_merged(folder: Path, wanted: Tensor, dtype: torch.dtype) -> None:
    """Compare the model in `folder`, as transformers reads it, with the adapter beside its base.

    Args:
        wanted: `logits_of` the model before it was merged.

    Raises:
        ValueError: it gives the tokens other probabilities.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    off = float((logits_of(model) - wanted).abs().mean())
    # Merged weights are rounded once more.
    limit = 1e-3 if dtype == torch.float32 else 0.1
    if not off <= limit:
        raise ValueError(
            f"the merged model in {str(folder)!r} is not what was trained: its log-probabilities "
            f"differ by {off:.3g} on average from the adapter beside its base; export without "
            "--merge"
        )


def _is_adapter(name: str) -> bool:
    return f".{_NAME}." in name or name.endswith(f".{_NAME}")


def _unprefixed(weights: Mapping[str, Tensor]) -> set[str]:
    """Names of layers that a saved adapter has weights for."""
    return {name.rsplit(".lora_", 1)[0] for name in weights}


def _check_all_there(lm: Any, layers: list[str], unknown: list[str], start: str) -> None:
    wanted = {name.rsplit(".lora_", 1)[0] for name, _ in lm.named_parameters() if ".lora_" in name}
    missing = sorted(wanted - set(layers))
    if missing or unknown:
        raise ValueError(
            f"model.lora.start: {start!r} does not fit the model: missing {missing[:3]}, unknown "
            f"{sorted(unknown)[:3]}"
        )


def _about_targets(lm: nn.Module, settings: LoraConfig, error: ValueError) -> str:
    if settings.target_modules is None:
        return f"model.lora: {_last_line(error)}"
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear) and "." in name
    }
    return (
        f"model.lora.target_modules: no layer of the model is named {settings.target_modules}, "
        f"expected some of {', '.join(sorted(linear))}"
    )


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("model.lora needs peft: pip install 'slap_ds[lora]'") from None
    return peft
