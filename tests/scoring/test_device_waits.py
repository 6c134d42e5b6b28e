"""Scoring and training a row never make the host wait for a GPU.

Tensors without values stand for those on a GPU: whatever would have to look at a value (`item`,
`nonzero`, a boolean index, a branch) is an error there, where a GPU would be waited for.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from slap_ds.scoring import Head, Response, ScoreRequest, WeightedTokenLoss, score_head
from slap_ds.scoring.token_loss import HeadGradient

T, E, V, SAMPLES, CHUNK = 300, 16, 40, 5, 64
WANTS = [
    ScoreRequest(),
    ScoreRequest("head_input", "exact_head"),
    ScoreRequest("head_input", None),
    ScoreRequest("head_kron", "hutchinson_head", size=(3, 4), probes=2),
    ScoreRequest("hvp", "exact_head", probes=2, token_share=0.5),
    ScoreRequest(extras=("el2n", "nuclear", "hidden")),
]


def response(kept: bool) -> Response:
    tokens = np.arange(20, T, 2)
    return Response(tokens, tokens * SAMPLES // T, tokens % 3 == 0 if kept else None)


def row() -> tuple[Tensor, Head, Tensor, Tensor]:
    hidden = torch.empty(T, E, dtype=torch.bfloat16)
    head = Head(torch.empty(V, E, dtype=torch.bfloat16))
    targets = torch.empty(T, dtype=torch.int64)
    return hidden, head, targets, torch.empty_like(targets)


@pytest.mark.parametrize("asked", WANTS)
def test_scoring_a_row_reads_nothing_back(asked: ScoreRequest) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, head, targets, sample = row()
        known = response(asked.token_share < 1)
        options = {"chunk_tokens": CHUNK, "response": known}
        out = score_head(hidden, head, targets, sample, SAMPLES, asked, **options)
        assert out.loss.shape == (SAMPLES,)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            Response.of(targets, sample)  # the device would be asked: the test can fail


def test_training_a_row_reads_nothing_back() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, head, targets, _ = row()
        hidden.requires_grad_()
        weight = head.weight.requires_grad_()
        token_weight = torch.empty(T)
        loss = WeightedTokenLoss.apply(
            hidden, weight, None, targets, token_weight, CHUNK, None, response(False)
        )
        (loss / 7.0).backward()
        assert hidden.grad.shape == hidden.shape
        delta = HeadGradient.apply(hidden, head, targets, CHUNK, response(False))
        torch.autograd.grad(delta, hidden, torch.empty_like(delta))
