"""The curvature's moving average, its floor, blocks and state; what the scorer makes of sums."""

import pytest
import torch

from slap_ds.config.schema import ScoringConfig
from slap_ds.scoring import Curvature, Scorer, Scores, ScoringPlan

BOTH = frozenset({"loss", "sketch"})


def make_scorer(needs=BOTH, **settings):
    return Scorer(ScoringPlan(ScoringConfig(**settings), frozenset(needs), seed=3))


def make_scores(n=4, width=5, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    fields = {
        "positions": torch.arange(n),
        "loss": torch.rand(n, generator=g) * 8,
        "tokens": torch.randint(1, 9, (n,), generator=g),
        "gradient": torch.randn(n, width, generator=g),
        "diagonal": torch.rand(width, generator=g),
        "diagonal_tokens": 9,
    }
    return Scores(**{**fields, **changes})


def test_the_average_is_bias_corrected():
    curvature = Curvature(0.9, 1.0, 1e-3)
    values = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0]), torch.tensor([2.0, 6.0])]
    for value in values:
        curvature.update(value * 10, 10)
    weights = torch.tensor([0.9**2, 0.9, 1.0]).double()
    expected = (torch.stack(values).double() * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(curvature.value(), expected)


def test_precondition_divides_by_the_floored_power():
    curvature = Curvature(0.0, 0.5, 0.1)
    curvature.update(torch.tensor([4.0, 0.0, -1e-9]), 1)
    gradient = torch.ones(2, 3)
    smallest = 0.1 * (4.0 + 1e-9) / 3
    expected = torch.tensor([4.0, smallest, smallest]).pow(-0.5).expand(2, 3)
    torch.testing.assert_close(curvature.precondition_(gradient.clone()), expected)


def test_negative_curvature_counts_by_its_magnitude():
    curvature = Curvature(0.0, 1.0, 1e-3)
    curvature.update(torch.tensor([4.0, -2.0, 1.0]), 1)
    assert curvature.value().tolist() == [4.0, 2.0, 1.0]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 100])
def test_blocks_share_their_mean(block):
    curvature = Curvature(0.9, 1.0, 1e-9, block)
    values = torch.rand(7, dtype=torch.float64) + 1
    curvature.update(values * 3, 3)
    expected = [values[i // block * block : i // block * block + block].mean() for i in range(7)]
    torch.testing.assert_close(curvature.value(), torch.stack(expected))


def test_a_broken_step_leaves_the_average_alone():
    curvature = Curvature(0.9, 1.0, 1e-3)
    assert curvature.scale() is None
    curvature.update(torch.tensor([1.0, 2.0]), 2)
    before = curvature.value()
    curvature.update(torch.tensor([float("nan"), 2.0]), 2)
    curvature.update(torch.tensor([1.0, 2.0]), 0)
    assert torch.equal(curvature.value(), before)
    assert curvature.updates == 1


def test_the_state_survives_exactly():
    scorer = make_scorer()
    scorer.finish(make_scores(width=7), torch.arange(4))
    other = make_scorer()
    other.load_state_dict(scorer.state_dict())
    assert torch.equal(other.curvature.value(), scorer.curvature.value())
    assert other.curvature.updates == 1


@pytest.mark.parametrize("needs", [frozenset({"loss"}), BOTH])
def test_twins_share_their_scores(needs):
    scorer = make_scorer(needs)
    scores = make_scores(
        loss=torch.tensor([2.0, 3.0, 2.0 + 1e-6, 8.0]), tokens=torch.tensor([2, 3, 2, 2])
    )
    if "sketch" not in needs:
        scores = make_scores(loss=scores.loss, tokens=scores.tokens, gradient=None, diagonal=None)
    batch = scorer.finish(scores, torch.tensor([7, 9, 7, 1]))
    assert batch.loss.tolist() == [1.0, 1.0, 1.0, 4.0]
    if scores.gradient is not None:
        assert torch.equal(batch.sketch[0], batch.sketch[2])
        expected = scores.gradient[1] / 3 / scorer.curvature.value().float()
        torch.testing.assert_close(batch.sketch[1], expected)


def test_unit_norm_keeps_directions_and_zeros():
    scores = make_scores()
    scores.gradient[2] = 0
    plain = make_scorer().finish(scores, torch.arange(4)).sketch
    unit = make_scorer(sketch_norm="unit").finish(scores, torch.arange(4)).sketch
    assert unit[2].abs().max() == 0
    rest = torch.tensor([0, 1, 3])
    torch.testing.assert_close(unit[rest].norm(dim=1), torch.ones(3))
    torch.testing.assert_close(unit[rest] * plain[rest].norm(dim=1)[:, None], plain[rest])


@pytest.mark.parametrize(
    "settings", [{"sketch": "head_kron", "sketch_size": (2, 2)}, {"sketch_dim": 4}]
)
def test_what_is_projected_is_preconditioned_by_the_steps_before(settings):
    scorer = make_scorer(**settings, curvature_power=0.5)
    assert scorer.request(0).scale is None
    scores = make_scores(gradient=torch.randn(4, 4))
    batch = scorer.finish(scores, torch.arange(4))
    torch.testing.assert_close(batch.sketch, scores.gradient / scores.tokens[:, None])
    expected = scorer.curvature.value().pow(-0.5).float()
    torch.testing.assert_close(scorer.request(1).scale, expected)


def test_a_selector_without_sketches_costs_none():
    scorer = make_scorer({"loss"})
    assert scorer.request(0) == type(scorer.request(0))()
    assert scorer.curvature is None
    assert scorer.state_dict() == {}


def test_a_width_beside_head_kron_is_refused():
    with pytest.raises(ValueError, match=r"set scoring\.sketch_dim null"):
        ScoringConfig(sketch="head_kron", sketch_dim=4)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", [False, True])
def test_shares_survive_the_wire_bit_for_bit(dtype, diagonal):
    """Widths and dtypes of any sketch, shares of any size, in the one payload of the gather."""
    from slap_ds.distributed.comm import _bytes, _pack, _unpack

    for n in (0, 1, 7):
        scores = make_scores(
            n,
            gradient=None if dtype is None else torch.randn(n, 13).to(dtype),
            diagonal=torch.rand(5) if diagonal else None,
            diagonal_tokens=2**40 + 1 if diagonal else 0,
            tokens=torch.arange(n) + 2**53 + 1,
        )
        payload = torch.zeros(_bytes(scores, n) + 9, dtype=torch.uint8)
        _pack(scores, payload)
        assert not payload[-9:].any()
        found = _unpack(payload, scores, n, scores.diagonal_tokens)
        for name, value in vars(scores).items():
            same = getattr(found, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(same, value), name
                assert same.dtype == value.dtype
            else:
                assert same == value, name


def test_bfloat16_sketches_leave_the_forward_in_bfloat16():
    from slap_ds.scoring import HeadScores, collect

    scorer = make_scorer(sketch_dtype="bfloat16")
    part = HeadScores(
        torch.rand(3),
        torch.tensor([2, 1, 4]),
        torch.randn(3, 5),
        torch.rand(5),
        torch.tensor(7),
    )
    scores = collect([torch.arange(3)], [part], scorer.request(0))
    assert scores.gradient.dtype == torch.bfloat16
    assert (scores.diagonal.dtype, scores.diagonal_tokens) == (torch.float32, 7)
    found = scorer.finish(scores, torch.arange(3)).sketch
    expected = part.gradient / part.tokens[:, None] / scorer.curvature.value().float()
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)
