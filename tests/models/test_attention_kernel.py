"""Which packed rows take torch's variable-length kernel, and what it is called with.

The kernel is CUDA's; here a plain attention over the same rows stands for it, with the signature of
torch 2.11 and with that of 2.13.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slap_ds.models import attention

LENGTHS = (1, 7, 12)


def plain(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int, scale: float) -> Tensor:
    """(T, H, d) each: softmax in float64, sample by sample, masks written out."""
    out = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        a, b, c = (x[begin:end].double().transpose(0, 1) for x in (q, k, v))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (distance < 0) | (distance > window if window >= 0 else False)
        scores = (a @ b.mT * scale).masked_fill(hidden, -torch.inf)
        out.append((scores.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(out).to(q.dtype)


def of_2_11(q, k, v, ends, ends_k, most, most_k, *, scale=None, window_size=(-1, -1)) -> Tensor:
    assert k.shape == q.shape, "this one does not share heads"
    assert (most, most_k) == (max(LENGTHS),) * 2
    assert window_size[1] == 0
    return plain(q, k, v, ends, window_size[0], scale)


def of_2_13(
    q, k, v, ends, ends_k, most, most_k, *, scale=None, window_size=(-1, -1), enable_gqa=False,
    num_splits=None,
) -> Tensor:  # fmt: skip
    assert enable_gqa == (k.shape[1] < q.shape[1]), "heads are shared where it is asked for"
    assert num_splits == 1, "a sample's bits must not depend on its row"
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    return plain(q, k, v, ends, window_size[0], scale)


@pytest.mark.parametrize("kernel", [of_2_11, of_2_13])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_of_either_torch_agrees_with_sdpa(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, heads: tuple[int, int], window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(1, h, total, 8, generator=generator) for h in (heads[0], *heads[1:] * 2))
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    options = {"sample_lengths": LENGTHS, "cu_seq_lens_q": ends, "scaling": 0.3}
    options["sliding_window"] = window
    module = torch.nn.Identity()
    expected, _ = attention.packed_attention(module, q, k, v, None, **options)
    monkeypatch.setattr(attention, "_packed", kernel)
    monkeypatch.setattr(attention, "has_kernel", lambda *_: True)
    found, _ = attention.packed_attention(module, q, k, v, None, **options)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "values", "dtype", "cuda", "has"),
    [
        (64, 64, torch.bfloat16, True, True),
        (256, 256, torch.float16, True, True),
        (60, 60, torch.bfloat16, True, False),  # no multiple of 8
        (264, 264, torch.bfloat16, True, False),
        (192, 128, torch.bfloat16, True, False),
        (64, 64, torch.float32, True, False),
        (64, 64, torch.bfloat16, False, False),
    ],
)
def test_rows_that_the_kernel_can_run(
    width: int, values: int, dtype: torch.dtype, cuda: bool, has: bool
) -> None:
    query: Any = SimpleNamespace(shape=(1, 2, 9, width), dtype=dtype, is_cuda=cuda)
    value: Any = SimpleNamespace(shape=(1, 2, 9, values))
    assert attention.has_kernel(query, value) == has
