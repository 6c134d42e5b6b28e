"""The example that shows the method does what it says."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

MINIMAL = Path(__file__).parents[1] / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    return runpy.run_path(str(MINIMAL))


def test_the_minimal_example_learns(minimal):
    losses = minimal["main"](steps=31)
    assert losses[0] == pytest.approx(np.log(minimal["VOCAB"]), abs=0.2)
    assert losses[-1] < 0.3 * losses[0]


def test_its_scores_are_those_of_each_sample_alone(minimal):
    from transformers import LlamaConfig

    from slap_ds.models.load import load_model
    from slap_ds.scoring import Curvature

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=minimal["VOCAB"], num_hidden_layers=1, **sizes)
    model = load_model(None, config, dtype="float32", attention="packed", seed=1)
    candidates = minimal["draw"](np.random.default_rng(3))
    scored = minimal["score"](model, candidates, Curvature(0.9, 1.0, 1e-3))
    for candidate, loss in zip(candidates, scored.loss.tolist(), strict=True):
        ids = torch.from_numpy(candidate.ids)
        row = minimal["make_row"]([candidate])
        logits = minimal["hidden_states"](model, row) @ model.lm_head.weight.t()
        assert loss == pytest.approx(float(F.cross_entropy(logits[1:-1], ids[2:])), rel=1e-5)
