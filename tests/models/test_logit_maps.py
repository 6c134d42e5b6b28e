"""Architectures that scale or cap their logits: the same losses as their own forward gives."""

import numpy as np
import pytest
import torch

from slap_ds.models.causal import LogitMap, PackedCausalLM
from slap_ds.models.load import load_config, load_model
from slap_ds.scoring import ScoreRequest
from tests.scoring.test_hutchinson import row_of_samples, samples_of

FIELDS = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
KINDS = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_models_own(kind):
    config = load_config(None, {"model_type": kind, **FIELDS, **KINDS[kind]})
    lm = load_model(None, config, dtype="float32", attention="eager", seed=0).eval()
    row = row_of_samples()
    expected = []
    for ids, targets in samples_of(row):
        loss = torch.nn.functional.cross_entropy(
            lm(ids[None]).logits[0], targets, ignore_index=-100, reduction="sum"
        )
        loss.backward()
        expected.append(float(loss.detach()))
    gradients = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    model = PackedCausalLM(lm, 3)
    with torch.no_grad():
        found = model(row, "score", ScoreRequest()).loss
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    loss = model(row, "train")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(expected), rel=1e-5)
    for name, p in lm.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_a_scale_of_unknown_meaning_is_refused():
    config = load_config(None, {"model_type": "llama", **FIELDS})
    assert LogitMap.of(config) == LogitMap(1.0, None)
    config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"llama sets logit_scale = 0\.5"):
        LogitMap.of(config)
