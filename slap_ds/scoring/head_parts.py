"""What is computed from each chunk of logits: the sketches and diagonals that are the head's own.

    sketch: InputGradient | Kron | Hvp          diagonal: ExactDiagonal | HutchinsonDiagonal

Shape letters: n samples of a row, E model width, V vocabulary, c tokens of a chunk, s samples a
chunk touches, m probes, (a, b) sizes of a Kronecker sketch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from slap_ds.device import to_device
from slap_ds.scoring.probes import projection, signs
from slap_ds.scoring.request import ScoreRequest
from slap_ds.scoring.softmax import Chunk, Head


class Part(Protocol):
    """One source or sketch: takes in the chunks of a row, then gives its sums."""

    def rows(self, chunk: Chunk) -> Tensor | None:
        """(k, V) that this part needs times W; those of all parts meet W together."""

    def add(self, chunk: Chunk, product: Tensor) -> None:
        """Take in a chunk; `product` (k, E) is `rows(chunk)` times W."""

    def result(self) -> Tensor:
        """The sums over all chunks."""


class InputGradient:
    """head_input: sum_t W^T r_t of each sample, (n, E); the gradient of the sample's summed loss
    with respect to a shift of all its final hidden states.

    It is linear in r, so a sample's r may be summed before W^T meets it: s (c + E) V instead of
    c E V multiply-adds, where s is the number of samples in the chunk.
    """

    def __init__(self, head: Head, samples: int) -> None:
        weight = head.weight
        self.sum = torch.zeros(samples, weight.shape[1], dtype=head.acc, device=weight.device)

    def rows(self, chunk: Chunk) -> Tensor | None:
        low, count = chunk.span
        if chunk.has_delta or not sums_first(len(chunk.y), count, self.sum.shape[1]):
            return None
        return chunk.member(chunk.inv, low, count) @ chunk.dense

    def add(self, chunk: Chunk, product: Tensor) -> None:
        if len(product):
            low, count = chunk.span
            self.sum[low : low + count] += product
        else:
            self.sum.index_put_((chunk.sample,), chunk.delta, accumulate=True)

    def result(self) -> Tensor:
        return self.sum


class Kron:
    """head_kron: sum_t (P delta_t) (Q h_t)^T of each sample, flattened: (n, a b).

    A sketch of G = sum_t delta_t h_t^T (E, E), the gradient with respect to a matrix A that maps
    the final hidden states by h -> (I + A) h. P (a, E) and Q (b, E) are random signs over sqrt(a)
    and sqrt(b), so E <S_i, S_j> = <G_i, G_j>, with a standard deviation of at most
    |G_i| |G_j| sqrt((1 + 2/a) (1 + 2/b) - 1) (docs/method.md). P meets W first: (V, a) instead of
    (V, E) is what the tokens' softmax is multiplied by.
    """

    def __init__(self, head: Head, samples: int, request: ScoreRequest) -> None:
        a, b = request.size
        width, device = head.weight.shape[1], head.weight.device
        self.p = to_device(projection(request.seed, "P", a, width), device, head.acc)
        if request.scale is not None:
            self.p *= to_device(request.scale, device, head.acc)
        self.q = to_device(projection(request.seed, "Q", b, width), device, head.acc)
        self.wp: Tensor | None = None
        self.sum = torch.zeros(samples, a * b, dtype=head.acc, device=device)

    def rows(self, chunk: Chunk) -> Tensor | None:
        return None

    def add(self, chunk: Chunk, product: Tensor) -> None:
        if chunk.has_delta:
            left = chunk.delta @ self.p.t()
        else:
            if self.wp is None:
                self.wp = chunk.head.project(self.p.t())
            left = chunk.inv[:, None] * (chunk.dense @ self.wp)
        right = chunk.h.to(left.dtype) @ self.q.t()
        outer = (left[:, :, None] * right[:, None, :]).flatten(1)
        self.sum.index_put_((chunk.sample,), outer, accumulate=True)

    def result(self) -> Tensor:
        return self.sum


class Hvp:
    """hvp: sum_t mean_k z_k * H_t z_k of each sample, (n, E), over m probes z_k of random signs.

    In expectation the diagonal of the sample's Hessian. Samples are summed before W^T:
    W^T (sum_t d_t * u - sum_t q_t (q_t . u)).
    """

    def __init__(self, head: Head, samples: int, request: ScoreRequest) -> None:
        self.z = head_probes(head, request)
        self.u = head.project(self.z)
        self.sum = torch.zeros(samples, len(self.z), dtype=head.acc, device=self.z.device)

    def rows(self, chunk: Chunk) -> Tensor | None:
        return None

    def add(self, chunk: Chunk, product: Tensor) -> None:
        qu = chunk.dot(self.u)
        low, count = chunk.span
        # A group's sums are (g, V): no more than an eighth of the chunk's logits.
        group = max(1, len(chunk.y) // 8)
        for start in range(low, low + count, group):
            size = min(group, low + count - start)
            here = chunk.of_samples(start, size)
            place = (chunk.sample[here] - start, chunk.y[here])
            bend = chunk.member(chunk.inv, start, size) @ chunk.bend
            bend.index_put_(place, chunk.bend_at[here], accumulate=True)
            for k in range(self.z.shape[1]):
                x = chunk.member(chunk.inv * qu[:, k], start, size) @ chunk.dense
                x.index_put_(place, (chunk.at * qu[:, k])[here], accumulate=True)
                x = x.neg_().addcmul_(bend, self.u[:, k])
                self.sum[start : start + size] += self.z[:, k] * chunk.head.times(x)

    def result(self) -> Tensor:
        return self.sum / self.z.shape[1]


class ExactDiagonal:
    """exact_head: sum_t (W * W)^T d_t - (W^T q_t)^2, (E,), over the chunk's kept tokens.

    The first term is linear in d, so d is summed over tokens and `W * W` meets one vector. The
    second needs every kept token's own (V,) x (V, E) product.
    """

    def __init__(self, head: Head) -> None:
        self.head, width = head, head.weight.shape[1]
        device = head.weight.device
        self.d = torch.zeros(head.weight.shape[0], dtype=head.acc, device=device)
        self.square = torch.zeros(width, dtype=head.acc, device=device)

    def rows(self, chunk: Chunk) -> Tensor | None:
        return None if chunk.has_delta else chunk.dense[chunk.counted]

    def add(self, chunk: Chunk, product: Tensor) -> None:
        index = chunk.counted
        at, y, inv = chunk.at[index], chunk.y[index], chunk.inv[index]
        delta = chunk.delta[index] if chunk.has_delta else product * inv[:, None]
        count = torch.zeros_like(chunk.inv).index_fill_(0, index, 1)
        self.d += chunk.sum_bend(count)
        mean = delta + at[:, None] * self.head.weight[y].to(delta.dtype)
        self.square += mean.square_().sum(0)

    def result(self) -> Tensor:
        return self.head.pull_squared(self.d) - self.square


class HutchinsonDiagonal:
    """hutchinson_head: mean_k z_k * (sum_t H_t) z_k, (E,), over m probes z_k of random signs.

    E z z^T = I makes it an unbiased estimate of the diagonal (Bekas et al. 2007). All tokens share
    the probes, so with U = W Z (V, m): H Z = W^T ((sum_t d_t) * U - sum_t q_t (q_t . U)), one
    accumulator (V, m) and no vector of width E per token.
    """

    def __init__(self, head: Head, request: ScoreRequest) -> None:
        self.head = head
        self.z = head_probes(head, request)
        self.u = head.project(self.z)
        self.d = torch.zeros_like(self.u[:, 0])
        self.outer = torch.zeros_like(self.u)

    def rows(self, chunk: Chunk) -> Tensor | None:
        return None

    def add(self, chunk: Chunk, product: Tensor) -> None:
        self.d += chunk.sum_bend(torch.ones_like(chunk.inv))
        self.outer += chunk.sum_dot(chunk.dot(self.u))

    def result(self) -> Tensor:
        hz = self.head.pull(self.d[:, None] * self.u - self.outer)
        return (self.z * hz).mean(1)


def head_probes(head: Head, request: ScoreRequest) -> Tensor:
    """Z (E, m) of random signs, new at every step, the same on every rank."""
    z = signs(request.seed, request.step, "probes", head.weight.shape[1], request.probes)
    return to_device(z, head.weight.device, head.acc)


def sums_first(tokens: int, samples: int, width: int) -> bool:
    """Whether summing r over each sample before W^T costs less than a (c, V) x (V, E) product.

    Twice its multiply-adds are counted for it: a product with few rows runs at the speed of memory.
    """
    return 2 * samples * (tokens + width) < tokens * width
