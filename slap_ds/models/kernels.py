"""Kernels of other libraries in the place of a model's own layers, where the config asks for them.

Liger's RMSNorm, SwiGLU and rotary embedding read and write memory once where PyTorch does several
times. They take the places of `forward`s inside blocks: names, weights and the blocks themselves
stay, so that checkpoints, ZeRO-3's gathers and forward reuse know no difference. Liger's own losses
are left out: the head is run by slap_ds.scoring.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch.cuda import is_available

_SWITCHED_OFF = ("cross_entropy", "fused_linear_cross_entropy")


def use_liger(lm: Any) -> None:
    """Put Liger's kernels into a transformers causal LM, before adapters or boundaries are.

    The rotary embedding is a function of the architecture's module: Liger replaces it for all
    models of that architecture in this process.

    Raises:
        ValueError: there is no GPU, liger-kernel is not installed, or it has no kernels for this
            architecture.
    """
    if not is_available():
        raise ValueError(
            "model.kernels liger: Liger's kernels are written in Triton and need a GPU, PyTorch "
            "sees none: set model.kernels torch"
        )
    try:
        liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"model.kernels liger: liger-kernel cannot be imported ({first}): pip install "
            "'slap_ds[liger]', or set model.kernels torch"
        ) from None
    kind, known = lm.config.model_type, liger.MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:
        raise ValueError(
            f"model.kernels liger: Liger has no kernels for {kind}: set model.kernels torch"
        )
    accepted = inspect.signature(known[kind]).parameters
    known[kind](model=lm, **{name: False for name in _SWITCHED_OFF if name in accepted})
