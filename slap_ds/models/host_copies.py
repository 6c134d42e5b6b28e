"""Block inputs on their way to the host's memory and back, beside a GPU's computation.

Copies run on a stream of their own, so that a scoring forward does not wait for each block's input
to leave, nor a training row for all of its inputs to come back before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Arriving(NamedTuple):
    """A tensor whose values may still be on their way."""

    tensor: Tensor
    wait: Callable[[], None]  # what is queued from now on comes after the values


class HostCopies:
    """To the host and back; on a CPU nothing is copied."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def keep(self, value: Tensor) -> Tensor:
        """(T, E) in pinned memory. The host must not read it: only `load` comes after the copy."""
        if not value.is_cuda:
            return value
        pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        stream = self._side(value.device)
        stream.wait_stream(torch.cuda.current_stream(value.device))  # until the value is there
        with torch.cuda.stream(stream):
            pinned.copy_(value, non_blocking=True)
        value.record_stream(stream)  # its memory is nobody else's until it has been copied
        return pinned

    def load(self, pieces: Sequence[Tensor], device: torch.device) -> Arriving:
        """The pieces end to end on the device."""
        if device.type != "cuda":
            return Arriving(torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0], lambda: None)
        stream = self._side(device)
        with torch.cuda.stream(stream):
            parts = [piece.to(device, non_blocking=True) for piece in pieces]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            there = stream.record_event()

        def wait() -> None:
            here = torch.cuda.current_stream(device)
            here.wait_event(there)
            whole.record_stream(here)

        return Arriving(whole, wait)

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream
