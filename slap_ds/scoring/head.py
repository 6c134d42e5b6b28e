"""Scores of a row from its final hidden states: loss, gradient and curvature, chunk by chunk.

    h (T, E), W (V, E) -> logits of a chunk -> softmax -> loss
                                                       -> sketch: InputGradient | Kron | Hvp
                                                       -> diagonal: ExactDiagonal | Hutchinson
                                                       -> extras: el2n, hidden, nuclear

Everything comes from one computation of a chunk's logits (save the nuclear norm, which takes a
second one), and nothing of size T x V is held. softmax.py has the formulas.

Shape letters: T tokens, n samples of a row, E model width, V vocabulary, c tokens of a chunk,
D width of the sketch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slap_ds.device import to_device
from slap_ds.scoring.head_parts import (
    ExactDiagonal,
    HutchinsonDiagonal,
    Hvp,
    InputGradient,
    Kron,
    Part,
)
from slap_ds.scoring.request import ScoreRequest
from slap_ds.scoring.response import Response
from slap_ds.scoring.softmax import Chunk, Head


class HeadScores(NamedTuple):
    """Sums over a row's response tokens; the scorer divides by the counts.

    A tuple, because DeepSpeed's hooks look for tensors in the outputs of modules.
    """

    loss: Tensor  # (n,) nats, summed over the sample's response tokens
    tokens: Tensor  # (n,) int64, response tokens
    gradient: Tensor | None = None  # (n, D): the sketch, summed over the sample's tokens
    diagonal: Tensor | None = None  # (E,): sum over `diagonal_tokens` tokens, finite ones only
    diagonal_tokens: Tensor | None = None  # () int64
    extras: Tensor | None = None  # (n, S): columns in the order of `ScoreRequest.extras`


@torch.no_grad()
def score_head(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    sample: Tensor,
    samples: int,
    request: ScoreRequest,
    *,
    chunk_tokens: int,
    scale: float = 1.0,
    kept: Tensor | None = None,
    response: Response | None = None,
) -> HeadScores:
    """Loss per sample, and of what `request` names the part that is the head's own.

    Args:
        hidden: (T, E) final hidden states.
        targets: (T,) int64, the next token or a negative number where nothing is trained.
        sample: (T,) int64 in [0, samples).
        scale: the logits are W (scale * h) + b.
        kept: (T,) bool, the tokens that count for the exact diagonal; None: all of them.
        response: what the host knows of targets, sample and kept; None: the device is asked.
    """
    response = response or Response.of(targets, sample, kept)
    sketch, diagonal = _sketch(head, samples, request), _diagonal(head, request)
    parts = [part for part in (sketch, diagonal) if part is not None]
    sums = _Sums(hidden, head, samples, request)
    for t, at, counts in response.pieces(chunk_tokens, hidden.device):
        h = hidden[t] if scale == 1 else hidden[t] * scale
        chunk = Chunk(
            head,
            h,
            targets[t],
            sample[t],
            at,
            derivatives=bool(parts),
            kept=counts,
            errors="el2n" in request.extras,
        )
        sums.add(chunk, hidden[t])
        if request.diagonal == "exact_head" and counts is None:
            _ = chunk.delta  # made here, so that the sketch uses it as well
        for part, product in zip(parts, _products(chunk, parts), strict=True):
            part.add(chunk, product)
        del chunk
    if "nuclear" in request.extras:
        norms = nuclear_norms(hidden, head, response, samples, chunk_tokens, scale)
        sums.place["nuclear"].copy_(norms[:, None])
    # The derivatives above are those by scale * h; head_kron's factors cancel.
    first, second = scale, scale**2
    return HeadScores(
        sums.loss,
        sums.tokens,
        None if sketch is None else sketch.result() * _factor(request, first, second),
        None if diagonal is None else diagonal.result() * second,
        None if diagonal is None else sums.counted,
        sums.extras if request.extras else None,
    )


class _Sums:
    """What is added up per sample beside sketch and diagonal."""

    def __init__(self, hidden: Tensor, head: Head, samples: int, request: ScoreRequest) -> None:
        device, acc = hidden.device, head.acc
        self.loss = torch.zeros(samples, dtype=acc, device=device)  # (n,)
        self.tokens = torch.zeros(samples, dtype=torch.int64, device=device)  # (n,)
        self.counts = request.diagonal is not None
        self.counted = torch.zeros((), dtype=torch.int64, device=device)  # tokens of the diagonal
        columns = [hidden.shape[1] if name == "hidden" else 1 for name in request.extras]
        self.extras = torch.zeros(samples, sum(columns), dtype=acc, device=device)  # (n, S)
        parts = self.extras.split(columns, dim=1)
        self.place = dict(zip(request.extras, parts, strict=True))

    def add(self, chunk: Chunk, hidden: Tensor) -> None:
        """A chunk whose final hidden states are `hidden` (c, E)."""
        at = (chunk.sample,)
        self.loss.index_put_(at, chunk.loss, accumulate=True)
        self.tokens.index_put_(at, torch.ones_like(chunk.sample), accumulate=True)
        if "el2n" in self.place:
            self.place["el2n"].index_put_(at, chunk.error[:, None], accumulate=True)
        if "hidden" in self.place:
            self.place["hidden"].index_put_(at, hidden.to(self.loss.dtype), accumulate=True)
        if self.counts:
            self.counted += chunk.finite[chunk.counted].sum()


def _sketch(head: Head, samples: int, request: ScoreRequest) -> Part | None:
    if request.sketch == "head_input":
        return InputGradient(head, samples)
    if request.sketch == "head_kron":
        return Kron(head, samples, request)
    return Hvp(head, samples, request) if request.sketch == "hvp" else None


def _diagonal(head: Head, request: ScoreRequest) -> Part | None:
    if request.diagonal == "exact_head":
        return ExactDiagonal(head)
    return HutchinsonDiagonal(head, request) if request.diagonal == "hutchinson_head" else None


def nuclear_norms(
    hidden: Tensor,
    head: Head,
    response: Response,
    samples: int,
    chunk_tokens: int,
    scale: float = 1.0,
) -> Tensor:
    """(n,) sum of the singular values of each sample's logits (T_i, V), its response tokens' alone.

    They are the roots of the eigenvalues of F F^T (T_i, T_i), which is added up over slices of the
    vocabulary, none with more numbers than the logits of a chunk. In float64, for in float32 roots
    below 3e-4 of the largest would be rounding. Costs T E V + sum_i T_i^2 V multiply-adds and about
    10 T_i^3 FLOPs for the eigenvalues; a slice and T_i^2 numbers of 8 bytes are held. NaN where
    logits are not finite. Arguments as in `score_head`.
    """
    vocab = len(head.weight)
    norms = torch.full((samples,), torch.nan, dtype=head.acc, device=hidden.device)
    for i in range(samples):
        h = hidden[to_device(response.tokens[response.sample == i], hidden.device)]
        if scale != 1:
            h = h * scale
        gram = torch.zeros(len(h), len(h), dtype=torch.float64, device=h.device)
        width = max(1, min(vocab, chunk_tokens * vocab // max(1, len(h))))
        for start in range(0, vocab, width):
            v = slice(start, start + width)
            part = Head(head.weight[v], None if head.bias is None else head.bias[v])
            logits = part.logits(h)
            if head.cap is not None:
                logits.div_(head.cap).tanh_().mul_(head.cap)
            wide = logits.double()
            gram.addmm_(wide, wide.t())
        finite = torch.isfinite(gram).all()  # eigvalsh refuses what is not
        roots = torch.linalg.eigvalsh(torch.where(finite, gram, 0)).clamp(min=0).sqrt()
        norms[i] = torch.where(finite, roots.sum(), torch.nan)
    return norms


def _products(chunk: Chunk, parts: list[Part]) -> list[Tensor]:
    """What each part's rows are times W; (0, E) for none.

    A product with few rows takes as long as reading W, so rows of several parts go through it as
    one, unless they are so many that a second copy of them would cost more memory than it is worth.
    """
    acc, dtype = chunk.head.acc, chunk.head.weight.dtype
    none = torch.zeros(0, chunk.head.weight.shape[0], dtype=dtype, device=chunk.y.device)
    rows = [none if (r := part.rows(chunk)) is None else r.to(dtype) for part in parts]
    if sum(len(r) for r in rows) > len(chunk.y) / 2 or sum(len(r) > 0 for r in rows) < 2:
        return [chunk.head.times(r) for r in rows]
    products = chunk.head.times(torch.cat(rows)).to(acc)
    return list(products.split([len(r) for r in rows]))


def _factor(request: ScoreRequest, first: float, second: float) -> float:
    return {"head_input": first, "hvp": second}.get(str(request.sketch), 1.0)


def head_cost(
    request: ScoreRequest, tokens: int, samples: int, width: int, vocab: int, chunk_tokens: int
) -> float:
    """FLOPs (2 per multiply-add) of the head's products in `score_head`, exponentials left out.

    Args:
        tokens: response tokens of the row. samples: its samples.
    """
    product = 2.0 * tokens * width * vocab
    spans = samples + tokens / chunk_tokens  # how often a chunk meets a sample
    summed = 2.0 * spans * (min(tokens, chunk_tokens) + width) * vocab
    a, _ = request.size
    flops = product
    has_delta = request.diagonal == "exact_head" and request.token_share == 1
    if request.diagonal == "exact_head":
        flops += request.token_share * product + 3.0 * width * vocab
    elif request.diagonal == "hutchinson_head":
        flops += 4.0 * request.probes * vocab * (tokens + width)
    if request.sketch == "head_input" and not has_delta:
        flops += min(product, summed)
    elif request.sketch == "head_kron":
        flops += 2.0 * a * (tokens * width if has_delta else vocab * (tokens + width))
    elif request.sketch == "hvp":
        flops += request.probes * (summed + 2.0 * vocab * (tokens + width))
    if request.sketch_dim is not None:
        flops += 2.0 * samples * width * request.sketch_dim
    if "nuclear" in request.extras:  # as if all samples were of one length
        flops += product + 2.0 * vocab * tokens**2 / max(1, samples)
    return flops


def head_bytes(
    request: ScoreRequest, samples: int, width: int, vocab: int, chunk_tokens: int
) -> int:
    """Most bytes of tensors that `score_head` holds at once, with float32 sums: a bound.

    chunk * V * 12 for the softmax (4 without, 6 with bfloat16, 12 with soft-capping), what is
    accumulated over (V,), and the sums of the row's samples.

    Args:
        samples: of one row.
    """
    a, b = request.size
    kron, hvp = request.sketch == "head_kron", request.sketch == "hvp"
    hutchinson = request.diagonal == "hutchinson_head"
    wide = (a * b if kron else width) + width * ("hidden" in request.extras)
    columns = 4 + request.probes * (2 * hutchinson + hvp) + a * kron
    per_token = 6 * width + 2 * wide * kron
    small = chunk_tokens * per_token + 3 * samples * wide + 4 * (columns + 4) * width
    return 12 * chunk_tokens * vocab + 4 * (columns * vocab + small) + 2**20
