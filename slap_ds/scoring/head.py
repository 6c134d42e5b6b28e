"""The head in closed form: loss, gradient and curvature of response tokens, chunk by chunk.

    h (T, E), W (V, E) -> logits of a chunk -> softmax -> loss
                                                       -> sketch: InputGradient | Kron | Hvp
                                                       -> diagonal: ExactDiagonal | Hutchinson
                                                       -> extras: el2n, hidden, nuclear

Everything comes from one computation of a chunk's logits (save the nuclear norm, which takes a
second one), and nothing of size T x V is held.
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

Shape letters: T tokens, n samples of a row, E model width, V vocabulary, c tokens of a chunk,
s samples a chunk touches, m probes, (a, b) sizes of a Kronecker sketch, D width of the sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slap_ds.scoring.probes import projection, signs
from slap_ds.scoring.wants import Wants


class HeadScores(NamedTuple):
    """Sums over a row's response tokens; the scorer divides by the counts.

    A tuple, because DeepSpeed's hooks look for tensors in the outputs of modules.
    """

    loss: Tensor  # (n,) nats, summed over the sample's response tokens
    tokens: Tensor  # (n,) int64, response tokens
    gradient: Tensor | None = None  # (n, D): the sketch, summed over the sample's tokens
    diagonal: Tensor | None = None  # (E,): sum over `diagonal_tokens` tokens, finite ones only
    diagonal_tokens: Tensor | None = None  # () int64
    extras: Tensor | None = None  # (n, S): columns in the order of `Wants.extras`


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
        return (h.to(self.weight.dtype) @ self.weight.t()).to(self.acc)

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
        derivatives: False leaves everything but the loss out.
        mask: make tokens of non-finite loss zero, so that one bad sample does not poison the sums
            that all samples share.
        kept: (c,) bool, the tokens that count for the exact diagonal; None: all.
        errors: compute `error`, the L2 norm of softmax - onehot(y) of each token.
    """

    def __init__(
        self,
        head: Head,
        h: Tensor,
        y: Tensor,
        sample: Tensor,
        *,
        derivatives: bool = True,
        mask: bool = True,
        kept: Tensor | None = None,
        errors: bool = False,
    ) -> None:
        self.head, self.h, self.y, self.sample, self.kept = head, h, y, sample, kept
        index = torch.arange(len(y), device=y.device)
        logits = head.logits(h)  # (c, V)
        if head.cap is not None:
            logits.div_(head.cap).tanh_().mul_(head.cap)
        target = logits[index, y]
        top = logits.amax(-1, keepdim=True)
        capped = head.cap is not None and derivatives
        dense = (logits - top if capped else logits.sub_(top)).exp_()
        total = dense.sum(-1)
        self.loss = total.log() + (top[:, 0] - target)  # (c,)
        self.finite = torch.isfinite(self.loss)  # (c,)
        if errors:
            # |p - onehot|^2 = sum p^2 - 2 p_y + 1, which cancels near p_y = 1 unless p_y - 1 is
            # formed first.
            at_target = dense[index, y]
            dense[index, y] = at_target - total
            self.error = torch.linalg.vector_norm(dense, dim=-1) / total  # (c,)
            dense[index, y] = at_target
        if not derivatives:
            return
        bend = dense  # (c, V)
        self.inv = total.reciprocal()  # (c,)
        self.at = torch.ones_like(total)  # (c,)
        self.bend_at = self.at  # (c,)
        if capped:
            assert head.cap is not None
            a = (logits / head.cap).square_().neg_().add_(1)
            dense.mul_(a)
            # p a' = -2 f q / cap^2, so that d = q (a - 2 f / cap^2) - a'_y onehot(y).
            bend = a.sub_(logits, alpha=2 / head.cap**2)
            del logits
            self.at = 1 - (target / head.cap).square()
            self.bend_at = self.at * bend[index, y] + 2 * target * self.at / head.cap**2
        dense[index, y] -= total * self.at
        if capped:
            bend.mul_(dense)
        if mask and not self.finite.all():
            self.h = torch.where(self.finite[:, None], h, 0)
            dense[~self.finite] = 0
            bend[~self.finite] = 0
            self.inv, self.at, self.bend_at = (
                torch.where(self.finite, x, 0) for x in (self.inv, self.at, self.bend_at)
            )
        self.dense, self.bend = dense, bend

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
        low, high = int(self.sample.min()), int(self.sample.max())
        return low, high - low + 1

    def member(self, weight: Tensor, low: int, count: int) -> Tensor:
        """(count, c): weight_t where token t is of that sample, else 0."""
        here = torch.arange(low, low + count, device=weight.device)[:, None] == self.sample
        return torch.where(here, weight, 0)

    @cached_property
    def counted(self) -> Tensor:
        """(k,) indices of the tokens that count for the exact diagonal."""
        if self.kept is None:
            return torch.arange(len(self.y), device=self.y.device)
        return self.kept.nonzero()[:, 0]

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


class Part(Protocol):
    """One source or sketch: takes in the chunks of a row, then gives its sums."""

    def rows(self, chunk: Chunk) -> Tensor | None:
        """(k, V) that this part needs times W; those of all parts meet W together."""

    def add(self, chunk: Chunk, product: Tensor) -> None:
        """Take in a chunk; `product` (k, E) is `rows(chunk)` times W."""

    def result(self) -> Tensor: ...


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

    def __init__(self, head: Head, samples: int, wants: Wants) -> None:
        a, b = wants.size
        width, device = head.weight.shape[1], head.weight.device
        self.p = projection(wants.seed, "P", a, width).to(device, head.acc)
        if wants.scale is not None:
            self.p *= wants.scale.to(self.p)
        self.q = projection(wants.seed, "Q", b, width).to(device, head.acc)
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

    def __init__(self, head: Head, samples: int, wants: Wants) -> None:
        self.z = head_probes(head, wants)
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
            here = (chunk.sample >= start) & (chunk.sample < start + size)
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

    def __init__(self, head: Head, wants: Wants) -> None:
        self.head = head
        self.z = head_probes(head, wants)
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


def head_probes(head: Head, wants: Wants) -> Tensor:
    """Z (E, m) of random signs, new at every step, the same on every rank."""
    z = signs(wants.seed, wants.step, "probes", head.weight.shape[1], wants.probes)
    return z.to(head.weight.device, head.acc)


def sums_first(tokens: int, samples: int, width: int) -> bool:
    """Whether summing r over each sample before W^T costs less than a (c, V) x (V, E) product.

    Twice its multiply-adds are counted for it: a product with few rows runs at the speed of memory.
    """
    return 2 * samples * (tokens + width) < tokens * width


@torch.no_grad()
def score_head(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    sample: Tensor,
    samples: int,
    wants: Wants,
    *,
    chunk_tokens: int,
    scale: float = 1.0,
    kept: Tensor | None = None,
) -> HeadScores:
    """Loss per sample, and of what `wants` names the part that is the head's own.

    Args:
        hidden: (T, E) final hidden states.
        targets: (T,) int64, the next token or a negative number where nothing is trained.
        sample: (T,) int64 in [0, samples).
        scale: the logits are W (scale * h) + b.
        kept: (T,) bool, the tokens that count for the exact diagonal; None: all of them.
    """
    device, acc = hidden.device, head.acc
    loss = torch.zeros(samples, dtype=acc, device=device)
    tokens = torch.zeros(samples, dtype=torch.int64, device=device)
    counted = torch.zeros((), dtype=torch.int64, device=device)
    diagonal: Part | None = None
    if wants.diagonal == "exact_head":
        diagonal = ExactDiagonal(head)
    elif wants.diagonal == "hutchinson_head":
        diagonal = HutchinsonDiagonal(head, wants)
    sketch: Part | None = None
    if wants.sketch == "head_input":
        sketch = InputGradient(head, samples)
    elif wants.sketch == "head_kron":
        sketch = Kron(head, samples, wants)
    elif wants.sketch == "hvp":
        sketch = Hvp(head, samples, wants)
    parts = [part for part in (sketch, diagonal) if part is not None]
    columns = [hidden.shape[1] if name == "hidden" else 1 for name in wants.extras]
    extras = torch.zeros(samples, sum(columns), dtype=acc, device=device)
    place = dict(zip(wants.extras, extras.split(columns, dim=1), strict=True))
    for t in response_chunks(targets, chunk_tokens):
        h = hidden[t] if scale == 1 else hidden[t] * scale
        chunk = Chunk(
            head,
            h,
            targets[t],
            sample[t],
            derivatives=bool(parts),
            kept=None if kept is None else kept[t],
            errors="el2n" in place,
        )
        loss.index_put_((chunk.sample,), chunk.loss, accumulate=True)
        tokens.index_put_((chunk.sample,), torch.ones_like(chunk.sample), accumulate=True)
        if "el2n" in place:
            place["el2n"].index_put_((chunk.sample,), chunk.error[:, None], accumulate=True)
        if "hidden" in place:
            place["hidden"].index_put_((chunk.sample,), hidden[t].to(acc), accumulate=True)
        counted += (chunk.finite if chunk.kept is None else chunk.finite & chunk.kept).sum()
        if wants.diagonal == "exact_head" and kept is None:
            _ = chunk.delta  # made here, so that the sketch uses it as well
        for part, product in zip(parts, _products(chunk, parts), strict=True):
            part.add(chunk, product)
        del chunk
    if "nuclear" in place:
        norms = nuclear_norms(hidden, head, targets, sample, samples, chunk_tokens, scale)
        place["nuclear"].copy_(norms[:, None])
    # The derivatives above are those by scale * h; head_kron's factors cancel.
    first, second = scale, scale**2
    return HeadScores(
        loss,
        tokens,
        None if sketch is None else sketch.result() * _factor(wants, first, second),
        None if diagonal is None else diagonal.result() * second,
        None if diagonal is None else counted,
        extras if wants.extras else None,
    )


def nuclear_norms(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    sample: Tensor,
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
    response = targets >= 0
    for i in range(samples):
        h = hidden[response & (sample == i)]
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
        if torch.isfinite(gram).all():
            norms[i] = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
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


def _factor(wants: Wants, first: float, second: float) -> float:
    return {"head_input": first, "hvp": second}.get(str(wants.sketch), 1.0)


def head_cost(
    wants: Wants, tokens: int, samples: int, width: int, vocab: int, chunk_tokens: int
) -> float:
    """FLOPs (2 per multiply-add) of the head's products in `score_head`, exponentials left out.

    Args:
        tokens: response tokens of the row. samples: its samples.
    """
    product = 2.0 * tokens * width * vocab
    spans = samples + tokens / chunk_tokens  # how often a chunk meets a sample
    summed = 2.0 * spans * (min(tokens, chunk_tokens) + width) * vocab
    a, _ = wants.size
    flops = product
    has_delta = wants.diagonal == "exact_head" and wants.token_share == 1
    if wants.diagonal == "exact_head":
        flops += wants.token_share * product + 3.0 * width * vocab
    elif wants.diagonal == "hutchinson_head":
        flops += 4.0 * wants.probes * vocab * (tokens + width)
    if wants.sketch == "head_input" and not has_delta:
        flops += min(product, summed)
    elif wants.sketch == "head_kron":
        flops += 2.0 * a * (tokens * width if has_delta else vocab * (tokens + width))
    elif wants.sketch == "hvp":
        flops += wants.probes * (summed + 2.0 * vocab * (tokens + width))
    if "nuclear" in wants.extras:  # as if all samples were of one length
        flops += product + 2.0 * vocab * tokens**2 / max(1, samples)
    return flops


def head_bytes(wants: Wants, samples: int, width: int, vocab: int, chunk_tokens: int) -> int:
    """Most bytes of tensors that `score_head` holds at once, with float32 sums: a bound.

    chunk * V * 12 for the softmax (4 without, 6 with bfloat16, 12 with soft-capping), what is
    accumulated over (V,), and the sums of the row's samples.

    Args:
        samples: of one row.
    """
    a, b = wants.size
    kron, hvp = wants.sketch == "head_kron", wants.sketch == "hvp"
    hutchinson = wants.diagonal == "hutchinson_head"
    wide = (a * b if kron else width) + width * ("hidden" in wants.extras)
    columns = 4 + wants.probes * (2 * hutchinson + hvp) + a * kron
    per_token = 6 * width + 2 * wide * kron
    small = chunk_tokens * per_token + 3 * samples * wide + 4 * (columns + 4) * width
    return 12 * chunk_tokens * vocab + 4 * (columns * vocab + small) + 2**20


class WeightedTokenLoss(torch.autograd.Function):
    """sum_t w_t * cross_entropy(head(h_t), y_t), with gradients made in the forward.

    The logits of a chunk are at hand once; making `d loss / d hidden` and `d loss / d W` from them
    there saves the backward a second (T, V) product and never holds more than a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weight: Tensor,
        chunk_tokens: int,
        cap: float | None = None,
    ) -> Tensor:
        head = Head(weight, bias, cap)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=head.acc) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=head.acc) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=head.acc, device=hidden.device)
        for t in response_chunks(targets, chunk_tokens):
            # Not masked: a gradient that is not finite must be seen.
            chunk = Chunk(head, hidden[t], targets[t], t, mask=False)
            w = token_weight[t].to(head.acc)
            total += (chunk.loss * w).sum()
            p = chunk.dense.mul_((w * chunk.inv)[:, None])
            if d_bias is not None:
                d_bias += p.sum(0)
            d_logits = p.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[t] = d_logits @ weight
            if d_weight is not None:
                if d_weight.dtype == weight.dtype:
                    d_weight.addmm_(d_logits.t(), chunk.h)
                else:
                    d_weight += d_logits.t() @ chunk.h
            del chunk
        ctx.grads = (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        grads = [None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.grads]
        ctx.grads = None
        return (*grads, None, None, None, None)


class HeadGradient(torch.autograd.Function):
    """(T, E) -> (T, E): delta_t, zero where nothing is trained; its own backward is v -> H_t v.

    A double backward through blocks and head so never holds the logits of more than a chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, chunk_tokens: int) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.rest = (head, targets, chunk_tokens)
        return _by_token(hidden, lambda chunk, t: chunk.delta, head, targets, chunk_tokens)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = upstream
        (hidden,) = ctx.saved_tensors
        product = _by_token(hidden, lambda chunk, t: chunk.product(v[t]), *ctx.rest)
        return (product, None, None, None)


def _by_token(
    hidden: Tensor,
    value: Callable[[Chunk, Tensor], Tensor],
    head: Head,
    targets: Tensor,
    chunk_tokens: int,
) -> Tensor:
    out = torch.zeros_like(hidden)
    for t in response_chunks(targets, chunk_tokens):
        chunk = Chunk(head, hidden[t], targets[t], t)
        out[t] = value(chunk, t).to(out.dtype)
        del chunk
    return out


def response_chunks(targets: Tensor, chunk_tokens: int) -> Iterator[Tensor]:
    """Indices of the response tokens, `chunk_tokens` at a time."""
    response = (targets >= 0).nonzero()[:, 0]
    if len(response):
        yield from response.split(chunk_tokens)
