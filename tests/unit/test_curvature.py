"""The curvature's moving average, its floor and its state."""

import pytest
import torch

from slap_ds.scoring import Curvature, Scorer, Scores


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
    smallest = 0.1 * (4.0 - 1e-9) / 3
    expected = torch.tensor([4.0, smallest, smallest]).pow(-0.5).expand(2, 3)
    torch.testing.assert_close(curvature.precondition(gradient), expected)


def test_a_broken_step_leaves_the_average_alone():
    curvature = Curvature(0.9, 1.0, 1e-3)
    curvature.update(torch.tensor([1.0, 2.0]), 2)
    before = curvature.state_dict()
    curvature.update(torch.tensor([float("nan"), 2.0]), 2)
    curvature.update(torch.tensor([1.0, 2.0]), 0)
    assert curvature.state_dict() == before


def test_the_state_survives_exactly():
    curvature = Curvature(0.9, 1.0, 1e-3)
    curvature.update(torch.rand(7), 3)
    other = Curvature(0.9, 1.0, 1e-3)
    other.load_state_dict(curvature.state_dict())
    assert torch.equal(other.value(), curvature.value())


@pytest.mark.parametrize("needs", [frozenset({"loss"}), frozenset({"loss", "sketch"})])
def test_twins_share_their_scores(needs):
    scorer = Scorer(needs, Curvature(0.9, 1.0, 1e-3))
    tokens = torch.tensor([2, 3, 2, 2])
    gradient = torch.randn(4, 5) if "sketch" in needs else None
    scores = Scores(
        torch.arange(4),
        torch.tensor([2.0, 3.0, 2.0 + 1e-6, 8.0]),
        tokens,
        gradient,
        torch.rand(5) if "sketch" in needs else None,
    )
    batch = scorer.finish(scores, torch.tensor([7, 9, 7, 1]))
    assert batch.loss[0] == batch.loss[2] == 1.0
    assert batch.loss.tolist() == [1.0, 1.0, 1.0, 4.0]
    if gradient is not None:
        assert torch.equal(batch.sketch[0], batch.sketch[2])
        expected = gradient[1] / 3 / scorer.curvature.value().float()
        torch.testing.assert_close(batch.sketch[1], expected)
