"""The head's closed forms against float64 double backward, chunking against whole logits."""

import pytest
import torch

from benchmarks.memory import TensorPeak
from slap_ds.scoring import Head, ScoreRequest, WeightedTokenLoss, score_head
from slap_ds.scoring.head import head_bytes, head_cost
from slap_ds.scoring.head_parts import head_probes, sums_first
from slap_ds.scoring.probes import projection
from slap_ds.scoring.token_loss import HeadGradient

SOURCES = [None, "exact_head", "hutchinson_head"]
SKETCHES = [None, "head_input", "head_kron", "hvp"]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "capped": {"cap": 3.0},
    "scaled": {"scale": 0.4},
    "all": {"bias": True, "cap": 2.0, "scale": 1.7},
}
EVERYTHING = ScoreRequest("head_input", "exact_head", seed=4, step=9, probes=3, size=(4, 3))


class Case:
    """A random row of n = 4 samples; V and E divisible by nothing."""

    def __init__(
        self,
        dtype=torch.float64,
        tokens=23,
        width=11,
        vocab=37,
        samples=4,
        bias=False,
        cap=None,
        scale=1.0,
    ):
        g = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64).to(dtype)
        weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype)
        b = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype) if bias else None
        self.head, self.scale, self.samples = Head(weight, b, cap), scale, samples
        self.sample = torch.arange(tokens) * samples // tokens
        self.targets = torch.randint(0, vocab, (tokens,), generator=g)
        self.targets[::3] = -100

    def score(self, request, chunk_tokens=5, **changes):
        arguments = {**vars(self), **changes}
        return score_head(
            arguments.pop("hidden"),
            arguments.pop("head"),
            arguments.pop("targets"),
            arguments.pop("sample"),
            arguments.pop("samples"),
            request,
            chunk_tokens=chunk_tokens,
            **arguments,
        )

    def token_loss(self, h, y):
        weight, bias, cap = self.head
        logits = self.scale * h @ weight.double().t() + (0 if bias is None else bias.double())
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return torch.nn.functional.cross_entropy(logits[None], y[None])

    def tokens(self):
        """(sample, h, gradient, Hessian) of every response token, by autograd in float64."""
        for h, y, s in zip(self.hidden.double(), self.targets, self.sample, strict=True):
            if y >= 0:

                def f(x, y=y):
                    return self.token_loss(x, y)

                jacobian = torch.autograd.functional.jacobian(f, h)
                yield int(s), h, jacobian, torch.autograd.functional.hessian(f, h), f(h)

    def expected(self, request):
        """Loss, sketch and diagonal written out token by token."""
        width = self.hidden.shape[1]
        z = head_probes(self.head, request).double()
        p = projection(request.seed, "P", request.size[0], width).double()
        if request.scale is not None:
            p = p * request.scale.double()
        q = projection(request.seed, "Q", request.size[1], width).double()
        wide = request.size[0] * request.size[1] if request.sketch == "head_kron" else width
        loss = torch.zeros(self.samples, dtype=torch.float64)
        sketch = torch.zeros(self.samples, wide, dtype=torch.float64)
        diagonal = torch.zeros(width, dtype=torch.float64)
        for s, h, gradient, hessian, value in self.tokens():
            loss[s] += value
            estimate = (z * (hessian @ z)).mean(1)
            diagonal += hessian.diagonal() if request.diagonal == "exact_head" else estimate
            if request.sketch == "head_kron":
                sketch[s] += torch.outer(p @ gradient, q @ h).flatten()
            else:
                sketch[s] += estimate if request.sketch == "hvp" else gradient
        return loss, sketch, diagonal


def check(found, expected, bound):
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= bound, f"{error:.1e}"


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sketch", SKETCHES)
def test_everything_equals_float64_double_backward(kind, source, sketch):
    case = Case(**HEADS[kind])
    scale = torch.linspace(0.5, 2, 11).double()
    request = EVERYTHING._replace(sketch=sketch, diagonal=source, scale=scale)
    out = case.score(request)
    loss, gradient, diagonal = case.expected(request)
    check(out.loss, loss, 1e-10)
    counted = [int(((case.sample == s) & (case.targets >= 0)).sum()) for s in range(4)]
    assert out.tokens.tolist() == counted
    assert (out.gradient is None) == (sketch is None)
    assert (out.diagonal is None) == (source is None)
    if sketch is not None:
        check(out.gradient, gradient, 1e-10)
    if source is not None:
        check(out.diagonal, diagonal, 1e-10)
        assert out.diagonal_tokens == sum(counted)


@pytest.mark.parametrize("sketch", SKETCHES[1:])
@pytest.mark.parametrize("source", SOURCES[1:])
def test_float32_and_bfloat16_accumulate_in_float32(sketch, source):
    for dtype, bound in [(torch.float32, 1e-4), (torch.bfloat16, 0.03)]:
        case = Case(dtype, tokens=200, vocab=300)
        request = EVERYTHING._replace(sketch=sketch, diagonal=source)
        out = case.score(request, chunk_tokens=16)
        assert {x.dtype for x in (out.loss, out.gradient, out.diagonal)} == {torch.float32}
        for found, expected in zip(
            (out.loss, out.gradient, out.diagonal), case.expected(request), strict=True
        ):
            assert (found - expected).norm() / expected.norm() <= bound


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("sketch", SKETCHES[1:])
@pytest.mark.parametrize("source", SOURCES)
def test_the_chunk_size_changes_nothing_but_rounding(sketch, source, kind):
    """Chunks of 1, 2, 7 tokens sum before or after W^T, as their costs say; all agree."""
    case = Case(width=29, **HEADS[kind])
    request = EVERYTHING._replace(sketch=sketch, diagonal=source)
    whole = case.score(request, chunk_tokens=1000)
    for chunk in (1, 2, 7, 16):
        for part, expected in zip(case.score(request, chunk_tokens=chunk), whole, strict=True):
            if expected is not None:
                torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-12)


def test_both_orders_of_summing_are_taken_and_equal(monkeypatch):
    import slap_ds.scoring.head_parts as module

    case = Case(tokens=64, width=29)
    request = ScoreRequest("head_input")
    assert sums_first(64, 4, 29)
    assert not sums_first(4, 4, 29)
    found = []
    for answer in (True, False):
        monkeypatch.setattr(module, "sums_first", lambda *_, a=answer: a)
        found.append(case.score(request, chunk_tokens=64).gradient)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_the_gradients_own_backward_is_the_hessian_vector_product(kind):
    case = Case(**HEADS[kind])
    g = torch.Generator().manual_seed(1)
    v = torch.randn(case.hidden.shape, generator=g, dtype=torch.float64)
    hidden = case.hidden.clone().requires_grad_()
    delta = case.scale * HeadGradient.apply(case.scale * hidden, case.head, case.targets, 5)
    (product,) = torch.autograd.grad(delta, hidden, v)
    row = iter(case.tokens())
    for t, y in enumerate(case.targets):
        if y < 0:
            assert delta[t].abs().max() == product[t].abs().max() == 0
            continue
        _, _, gradient, hessian, _ = next(row)
        check(delta[t].detach(), gradient, 1e-10)
        check(product[t], hessian @ v[t], 1e-10)


@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_the_diagonal_of_some_tokens_is_that_of_a_row_of_them(kind):
    case = Case(**HEADS[kind])
    request = EVERYTHING._replace(token_share=0.5)
    kept = torch.arange(23) % 2 == 0
    found = case.score(request, kept=kept)
    alone = case.score(EVERYTHING, targets=torch.where(kept, case.targets, -100))
    whole = case.score(EVERYTHING)
    torch.testing.assert_close(found.diagonal, alone.diagonal, rtol=1e-10, atol=1e-12)
    assert found.diagonal_tokens == int((kept & (case.targets >= 0)).sum())
    torch.testing.assert_close(found.gradient, whole.gradient, rtol=1e-10, atol=1e-12)
    none = case.score(request, kept=torch.zeros(23, dtype=torch.bool))
    assert none.diagonal_tokens == 0
    assert none.diagonal.abs().max() == 0


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_without_response_tokens_scores_zero_over_zero(sketch, source):
    case = Case()
    case.targets[case.sample == 2] = -100
    out = case.score(EVERYTHING._replace(sketch=sketch, diagonal=source))
    assert out.tokens[2] == 0
    assert out.loss[2] == 0
    assert (out.loss / out.tokens).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("sketch", SKETCHES[1:])
@pytest.mark.parametrize("source", SOURCES[1:])
def test_answers_of_one_token(sketch, source):
    case = Case(tokens=9, samples=9)
    case.targets = torch.arange(9)
    request = EVERYTHING._replace(sketch=sketch, diagonal=source)
    for chunk in (4, 100):
        out = case.score(request, chunk_tokens=chunk)
        assert out.tokens.tolist() == [1] * 9
        for found, expected in zip(
            (out.loss, out.gradient, out.diagonal), case.expected(request), strict=True
        ):
            check(found, expected, 1e-10)


@pytest.mark.parametrize(
    "asked", [ScoreRequest(), EVERYTHING, EVERYTHING._replace(sketch="head_kron")]
)
def test_a_row_without_samples(asked):
    case = Case(tokens=1, samples=0)
    case.sample, case.targets = torch.zeros(1, dtype=torch.int64), torch.tensor([-100])
    out = case.score(asked)
    assert out.loss.shape == out.tokens.shape == (0,)
    if asked.diagonal:
        assert out.diagonal.abs().max() == 0
        assert len(out.gradient) == out.diagonal_tokens == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["plain", "capped"])
@pytest.mark.parametrize("sketch", SKETCHES[1:])
@pytest.mark.parametrize("source", SOURCES[1:])
def test_a_broken_sample_stays_out_of_what_all_share(sketch, source, kind, broken):
    case = Case(**HEADS[kind])
    request = EVERYTHING._replace(sketch=sketch, diagonal=source)
    keep = case.sample != 1
    clean = case.score(request, targets=torch.where(keep, case.targets, -100))
    case.hidden[case.sample == 1] = broken
    out = case.score(request)
    assert torch.isfinite(out.loss).tolist() == [True, False, True, True]
    torch.testing.assert_close(out.diagonal, clean.diagonal)
    assert out.diagonal_tokens == clean.diagonal_tokens
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(out.gradient[others], clean.gradient[others])


@pytest.mark.parametrize("kind", ["plain", "bias", "capped"])
def test_training_loss_and_gradients_equal_autograd(kind):
    case = Case(**HEADS[kind])
    hidden, (weight, b, cap) = case.hidden, case.head
    leaves = [x.requires_grad_() for x in (hidden, weight, b) if x is not None]
    token_weight = torch.linspace(0.1, 2, 4, dtype=torch.float64)[case.sample]
    loss = WeightedTokenLoss.apply(hidden, weight, b, case.targets, token_weight, 4, cap)
    (3 * loss).backward()
    found = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    logits = hidden @ weight.t() + (0 if b is None else b)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    per_token = torch.nn.functional.cross_entropy(
        logits, case.targets, ignore_index=-100, reduction="none"
    )
    expected = (per_token * token_weight).sum()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for grad, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_a_row_without_targets_gives_zero_gradients():
    case = Case()
    hidden, weight = case.hidden.requires_grad_(), case.head.weight.requires_grad_()
    nothing = torch.full_like(case.targets, -100)
    loss = WeightedTokenLoss.apply(hidden, weight, None, nothing, torch.zeros(23), 4)
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_a_gradient_that_is_not_finite_is_seen_in_training():
    case = Case()
    case.hidden[4] = float("nan")
    hidden, weight = case.hidden.requires_grad_(), case.head.weight.requires_grad_()
    WeightedTokenLoss.apply(hidden, weight, None, case.targets, torch.ones(23), 4).backward()
    assert weight.grad.isnan().any()


@pytest.mark.parametrize("kind", ["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("source", SOURCES)
def test_peak_memory_is_within_the_documented_bound(sketch, source, share, dtype, kind):
    chunk = 64
    case = Case(dtype, tokens=300, width=32, vocab=8191, samples=6, **HEADS[kind])
    request = EVERYTHING._replace(sketch=sketch, diagonal=source, token_share=share)
    kept = None if share == 1 else torch.arange(300) % 4 == 0
    case.score(request, chunk_tokens=chunk, kept=kept)
    with TensorPeak([case.hidden, case.head.weight, case.targets, case.sample]) as peak:
        case.score(request, chunk_tokens=chunk, kept=kept)
    bound = head_bytes(request, case.samples, 32, 8191, chunk)
    assert bound <= (12 * chunk + 4 * (4 + 3 * 3 + 4)) * 8191 + 1.5 * 2**20
    assert chunk * 8191 * 4 < peak.bytes <= bound - 2**19


def test_counted_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(torch.float32, tokens=256, width=32, vocab=2047, samples=4)
    case.targets.clamp_(min=0)
    for source in SOURCES:
        for sketch in SKETCHES:
            request = EVERYTHING._replace(sketch=sketch, diagonal=source)
            with FlopCounterMode(display=False) as counter:
                case.score(request, chunk_tokens=64)
            expected = head_cost(request, 256, 4, 32, 2047, 64)
            assert counter.get_total_flops() == pytest.approx(expected, rel=0.25), (source, sketch)
