"""What host and device tell each other, without one waiting for the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(
    values: npt.NDArray[np.int64] | Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """The same on the device; the host does not wait for the copy."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from pageable memory a copy waits for the stream
    return tensor.to(device, dtype, non_blocking=True)
