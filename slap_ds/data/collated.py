"""Samples in a batch that a collator has made: padded, packed or padding-free.

    input_ids, labels (B, T)  +  attention_mask or position_ids (B, T)  ->  one Candidate a sample

Labels are those of transformers: the token itself where it is trained, -100 elsewhere; the model
shifts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from slap_ds.data.packing import IGNORE, Candidate

# What a collator may add; the lengths and places of samples are computed anew here.
_KNOWN = {"input_ids", "labels", "attention_mask", "position_ids", "seq_idx", "seq_lengths"}
_KNOWN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
_WHAT = "expected (B, T) token ids under input_ids, with labels and attention_mask or position_ids"


def samples_of(batch: Mapping[str, Any]) -> list[Candidate]:
    """The samples of a batch in reading order, those without a trained token left out.

    A row is one sample, or several one after the other where `position_ids` begin anew.

    Raises:
        ValueError: no token ids or labels, or inputs of another kind (images, token types); a mask
            of another shape or with holes; labels that are not the tokens themselves (shifted).
    """
    if unknown := sorted(set(batch) - _KNOWN):
        raise ValueError(
            f"the batch holds {', '.join(unknown)}, which packed rows have no place for: only text "
            "models without further inputs can be trained here"
        )
    ids, labels = (_matrix(batch, name) for name in ("input_ids", "labels"))
    mask = _matrix(batch, "attention_mask", ids.shape) if _given(batch, "attention_mask") else None
    places = _matrix(batch, "position_ids", ids.shape) if _given(batch, "position_ids") else None
    if labels.shape != ids.shape:
        raise ValueError(f"labels have shape {labels.shape}, input_ids {ids.shape}: {_WHAT}")
    trained = labels != IGNORE
    if not (labels == ids)[trained].all():
        raise ValueError(
            "labels are not the tokens of input_ids where they are trained: give labels that are "
            "not shifted, -100 where nothing is trained"
        )
    found: list[Candidate] = []
    for row in range(len(ids)):
        for span in _spans(row, mask, places, ids.shape[1]):
            wanted = trained[row, span]
            if wanted[1:].any():
                found.append(Candidate(len(found), ids[row, span], wanted))
    return found


def _spans(
    row: int, mask: npt.NDArray[Any] | None, places: npt.NDArray[Any] | None, width: int
) -> list[slice]:
    """Where the samples of a row begin and end."""
    first, last = 0, width
    if mask is not None:
        seen = mask[row].nonzero()[0]
        if not len(seen):
            return []
        first, last = int(seen[0]), int(seen[-1]) + 1
        if len(seen) != last - first:
            raise ValueError("attention_mask has holes: a row's tokens must be adjacent")
    cuts = [first]
    if places is not None:
        jumps = np.diff(places[row, first:last]) != 1
        cuts += [first + 1 + int(at) for at in jumps.nonzero()[0]]
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], last], strict=True)]


def _given(batch: Mapping[str, Any], name: str) -> bool:
    return batch.get(name) is not None


def _matrix(
    batch: Mapping[str, Any], name: str, shape: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    if not _given(batch, name):
        raise ValueError(f"the batch has no {name}, but {', '.join(sorted(batch))}: {_WHAT}")
    value = batch[name]
    array = np.asarray(value.cpu() if hasattr(value, "cpu") else value)
    if array.ndim != 2 or (shape is not None and array.shape != shape):
        raise ValueError(f"{name} has shape {array.shape}: {_WHAT}")
    return array
