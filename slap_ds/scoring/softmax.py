"""A chunk of a head's logits and all derivatives that follow from it; the head in closed form.

With the logits f = W h + b, soft-capped to cap * tanh(f / cap) where the model does that, and
p = softmax(f), the derivatives of a token's loss with respect to its raw logits are

    gradient r = q - a_y onehot(y),    Hessian diag(d) - q q^T

    plain:       q = p,      d = p,                                      a_y = 1
    soft-capped: q = p * a,  d = q * a + (p - onehot(y)) * a',           a = 1 - (f / cap)^2,
                             a' = -2 f a / cap^2  (f capped)

so that, exactly and for both (docs/method.md):

    gradient   W^T r
    diagonal   (W * W)^T d - (W^T q)^2
    product    W^T (d * u - q (q . u)),  u = W z

Shape letters: E model width, V vocabulary, c tokens of a chunk, s samples a chunk touches,
m probes.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from slap_ds.device import to_device
from slap_ds.scoring.response import Booleans, Integers


class Head(NamedTuple):
    """A linear-softmax head where its weight is whole."""

    weight: Tensor  # (V, E)
    bias: Tensor | None = None  # (V,)
    cap: float | None = None  # logits are cap * tanh(logits / cap)

    @property
    def acc(self) -> torch.dtype:
        """Sums are float32 for bfloat16 and float32 weights, float64 for float64 ones."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def logits(self, h: Tensor) -> Tensor:
        """(c, E) -> (c, V), before any cap."""
        logits = self.times_transposed(h)
        return logits if self.bias is None else logits.add_(self.bias.to(self.acc))

    def times_transposed(self, h: Tensor) -> Tensor:
        """(c, E) -> (c, V): rows times W^T."""
        # Not F.linear: under ZeRO-3 DeepSpeed replaces it by a version of its own.
        h, weight = h.to(self.weight.dtype), self.weight
        if weight.dtype == self.acc:
            return h @ weight.t()
        if weight.is_cuda:  # rounded to bfloat16, logits would be off by up to 2^-9 of themselves
            wide: Tensor = torch.mm(h, weight.t(), out_dtype=self.acc)
            return wide
        h = h.to(self.acc)
        return torch.cat([h @ w.to(self.acc).t() for w in weight.split(2**13)], 1)

    def times(self, x: Tensor) -> Tensor:
        """(c, V) -> (c, E): rows times W."""
        return (x.to(self.weight.dtype) @ self.weight).to(self.acc)

    def project(self, z: Tensor) -> Tensor:
        """(E, m) -> (V, m): W z in full precision."""
        return torch.cat([w.to(self.acc) @ z for w in self._pieces()])

    def pull(self, x: Tensor) -> Tensor:
        """(V, m) -> (E, m): W^T x in full precision."""
        out = torch.zeros(self.weight.shape[1], x.shape[1], dtype=self.acc, device=x.device)
        for w, part in zip(self._pieces(), x.split(self._piece_rows()), strict=True):
            out.addmm_(w.to(self.acc).t(), part)
        return out

    def pull_squared(self, d: Tensor) -> Tensor:
        """(V,) -> (E,): (W * W)^T d without holding W * W."""
        out = torch.zeros(self.weight.shape[1], dtype=self.acc, device=d.device)
        for w, part in zip(self._pieces(), d.split(self._piece_rows()), strict=True):
            out.addmv_(w.to(self.acc).square().t(), part)
        return out

    def _piece_rows(self) -> int:
        # A piece should stay in a processor's cache; a GPU wants few launches instead.
        return 2048 if self.weight.is_cuda else max(1, 2**17 // self.weight.shape[1])

    def _pieces(self) -> tuple[Tensor, ...]:
        pieces: tuple[Tensor, ...] = self.weight.split(self._piece_rows())
        return pieces


class Chunk:
    """The softmax of c response tokens and what follows from it.

    The vectors q, r and d of the module's formulas are kept as unnormalised dense numbers and one
    entry at the target:

        r_t = inv_t dense_t                  q_t = r_t + at_t onehot(y_t)
        d_t = inv_t bend_t + bend_at_t onehot(y_t)

    which saves the passes over (c, V) that normalise, and loses no digits where p_y is near 1.

    Args:
        h: (c, E). y: (c,) targets. sample: (c,), which sample a token is of.
        place: (c,) the same as `sample`, on the host, which must not wait for the device.
        derivatives: False leaves everything but the loss out.
        mask: make tokens of non-finite loss zero, so that one bad sample does not poison the sums
            that all samples share.
        kept: (c,) bool on the host, the tokens that count for the exact diagonal; None: all.
        errors: compute `error`, the L2 norm of softmax - onehot(y) of each token.
    """

    def __init__(
        self,
        head: Head,
        h: Tensor,
        y: Tensor,
        sample: Tensor,
        place: Integers,
        *,
        derivatives: bool = True,
        mask: bool = True,
        kept: Booleans | None = None,
        errors: bool = False,
    ) -> None:
        self.head, self.h, self.y, self.sample = head, h, y, sample
        self.place, self.kept = place, kept
        at_target = torch.arange(len(y), device=y.device), y
        logits = head.logits(h)  # (c, V)
        if head.cap is not None:
            logits.div_(head.cap).tanh_().mul_(head.cap)
        target = logits[at_target]
        top = logits.amax(-1, keepdim=True)
        capped = head.cap is not None and derivatives  # the logits are needed again
        dense = (logits - top if capped else logits.sub_(top)).exp_()
        total = dense.sum(-1)
        self.loss = total.log() + (top[:, 0] - target)  # (c,)
        self.finite = torch.isfinite(self.loss)  # (c,)
        if errors:
            self.error = _error(dense, total, at_target)  # (c,)
        if not derivatives:
            return
        self.inv = total.reciprocal()  # (c,)
        if head.cap is None:
            self._plain(dense, total, at_target)
        else:
            self._capped(dense, logits, total, at_target, head.cap)
        if mask:  # always: asking whether any is broken would cost more than the pass
            self._mask()

    def _plain(self, dense: Tensor, total: Tensor, at_target: tuple[Tensor, Tensor]) -> None:
        """q = d = p: one dense tensor (c, V) serves both."""
        dense[at_target] -= total
        self.dense = self.bend = dense
        self.at = self.bend_at = torch.ones_like(total)  # (c,)

    def _capped(
        self,
        dense: Tensor,
        logits: Tensor,
        total: Tensor,
        at_target: tuple[Tensor, Tensor],
        cap: float,
    ) -> None:
        target = logits[at_target]
        a = (logits / cap).square_().neg_().add_(1)
        dense.mul_(a)
        # p a' = -2 f q / cap^2, so that d = q (a - 2 f / cap^2) - a'_y onehot(y).
        bend = a.sub_(logits, alpha=2 / cap**2)
        self.at = 1 - (target / cap).square()
        self.bend_at = self.at * bend[at_target] + 2 * target * self.at / cap**2
        dense[at_target] -= total * self.at
        self.dense, self.bend = dense, bend.mul_(dense)

    def _mask(self) -> None:
        """Tokens without a finite loss count as zeros in all sums."""
        broken = ~self.finite[:, None]
        self.h = self.h.masked_fill(broken, 0)
        self.dense.masked_fill_(broken, 0)
        if self.bend is not self.dense:
            self.bend.masked_fill_(broken, 0)
        self.inv, self.at, self.bend_at = (
            torch.where(self.finite, x, 0) for x in (self.inv, self.at, self.bend_at)
        )

    @cached_property
    def delta(self) -> Tensor:
        """(c, E): W^T r_t, each token's gradient with respect to its hidden state."""
        return self.head.times(self.dense) * self.inv[:, None]

    @property
    def has_delta(self) -> bool:
        return "delta" in self.__dict__

    @cached_property
    def span(self) -> tuple[int, int]:
        """The lowest sample here, and how many the chunk spans."""
        low, high = int(self.place.min()), int(self.place.max())
        return low, high - low + 1

    def of_samples(self, low: int, count: int) -> Tensor:
        """Indices of the tokens of the samples [low, low + count)."""
        here = (self.place >= low) & (self.place < low + count)
        return to_device(here.nonzero()[0], self.y.device)

    def member(self, weight: Tensor, low: int, count: int) -> Tensor:
        """(count, c): weight_t where token t is of that sample, else 0."""
        here = torch.arange(low, low + count, device=weight.device)[:, None] == self.sample
        return torch.where(here, weight, 0)

    @cached_property
    def counted(self) -> Tensor:
        """(k,) indices of the tokens that count for the exact diagonal."""
        if self.kept is None:
            return torch.arange(len(self.y), device=self.y.device)
        return to_device(self.kept.nonzero()[0], self.y.device)

    def sum_bend(self, weight: Tensor) -> Tensor:
        """(V,): sum_t weight_t d_t."""
        return self._at_targets((weight * self.inv) @ self.bend, weight * self.bend_at)

    def dot(self, u: Tensor) -> Tensor:
        """(V, m) -> (c, m): q_t . u."""
        return self.inv[:, None] * (self.dense @ u) + self.at[:, None] * u[self.y]

    def sum_dot(self, x: Tensor) -> Tensor:
        """(c, m) -> (V, m): sum_t q_t x_t^T."""
        return self._at_targets(self.dense.t() @ (self.inv[:, None] * x), self.at[:, None] * x)

    def product(self, v: Tensor) -> Tensor:
        """(c, E) -> (c, E): H_t v_t, a vector of its own for each token."""
        index = torch.arange(len(self.y), device=self.y.device)
        u = self.head.times_transposed(v)
        u_y = u[index, self.y]
        qu = self.inv * torch.einsum("cv,cv->c", self.dense, u) + self.at * u_y
        x = u.mul_(self.bend).addcmul_(self.dense, qu[:, None], value=-1).mul_(self.inv[:, None])
        x[index, self.y] += self.bend_at * u_y - self.at * qu
        return self.head.times(x)

    def _at_targets(self, out: Tensor, values: Tensor) -> Tensor:
        # index_put_ adds in a fixed order on CUDA too; index_add_ does not.
        return out.index_put_((self.y,), values, accumulate=True)


def _error(dense: Tensor, total: Tensor, at_target: tuple[Tensor, Tensor]) -> Tensor:
    """(c,): |p - onehot(y)|, p = dense / total; dense (c, V) is left as it was.

    |p - onehot|^2 = sum p^2 - 2 p_y + 1 cancels near p_y = 1 unless p_y - 1 is formed first.
    """
    here = dense[at_target]
    dense[at_target] = here - total
    error: Tensor = torch.linalg.vector_norm(dense, dim=-1) / total
    dense[at_target] = here
    return error
