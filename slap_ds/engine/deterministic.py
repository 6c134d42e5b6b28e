"""`engine.deterministic`: the same bits from run to run on a GPU, where torch can give them."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Switch this process to kernels that add in a fixed order; for good.

    torch raises where an operator has none. Seeds need nothing: what a step draws follows from
    `seed` and its number alone.
    """
    # Read by cuBLAS when its first handle is made: a workspace for each stream.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Read by transformers when it calls the flash-attn package, whose backward is torch's own too.
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor would show reads of what nobody wrote; there are none to be fixed.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
