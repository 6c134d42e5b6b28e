"""Tensors in a checkpoint's JSON: compact, and exact to the bit."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_text(x: Tensor) -> dict[str, Any]:
    """A float32 tensor as base64 of its little-endian bytes, 5.4 characters a number."""
    data = x.cpu().numpy().astype("<f4", copy=False).tobytes()
    return {"shape": list(x.shape), "float32": base64.b64encode(data).decode("ascii")}


def from_text(text: Mapping[str, Any]) -> Tensor:
    """Undo `to_text`."""
    data = np.frombuffer(base64.b64decode(text["float32"]), dtype="<f4")
    return torch.from_numpy(data.astype(np.float32)).reshape(text["shape"])
