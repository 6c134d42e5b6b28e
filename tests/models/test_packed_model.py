"""Packed rows equal separate samples; samples that can see each other would be noticed."""

import pytest
import torch

from slap_ds.data.packing import Candidate, PackedRow, make_row
from slap_ds.models.causal import PackedCausalLM
from slap_ds.models.load import check_window, load_config, load_model
from slap_ds.scoring import ScoreRequest
from slap_ds.train.checks import check_head
from tests.models.test_reuse import small

KINDS = ["llama", "glm", "mistral", "qwen2"]


def candidates():
    g = torch.Generator().manual_seed(4)
    out = []
    for i, n in enumerate((9, 4, 14)):
        ids = torch.randint(3, 50, (n,), generator=g).numpy()
        mask = torch.rand(n, generator=g).numpy() < 0.7
        mask[-1] = True
        out.append(Candidate(i, ids, mask))
    return out


def scores(model, row):
    with torch.no_grad():
        return model(row, "score", ScoreRequest())


def separately(model):
    parts = [scores(model, make_row([c])) for c in candidates()]
    return torch.cat([p.loss for p in parts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_packed_equals_unpacked(kind, attention):
    model = PackedCausalLM(small(kind, attention, head_dim=8), 8).eval()
    packed = scores(model, make_row(candidates()))
    torch.testing.assert_close(packed.loss, separately(model), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_a_change_in_one_sample_leaves_the_others_alone(kind, attention):
    model = PackedCausalLM(small(kind, attention, head_dim=8), 8).eval()
    before = scores(model, make_row(candidates())).loss
    first, *others = candidates()
    other = Candidate(0, (first.ids + 7) % 50, first.mask)
    after = scores(model, make_row([other, *others])).loss
    assert before[0] != after[0]
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-6, atol=1e-6)


def test_the_isolation_test_can_fail():
    """Position ids that do not restart let samples see each other: the loss shows it."""
    model = PackedCausalLM(small("llama", "sdpa"), 8).eval()
    row = make_row(candidates())
    leaking = row._replace(position_ids=torch.arange(row.tokens)[None])
    difference = (scores(model, leaking).loss - separately(model)).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_sliding_windows_hold_inside_samples(attention):
    lm = small("mistral", attention, head_dim=8, sliding_window=5)
    model = PackedCausalLM(lm, 8).eval()
    reference = PackedCausalLM(small("mistral", "eager", head_dim=8, sliding_window=5), 8).eval()
    found = scores(model, make_row(candidates())).loss
    torch.testing.assert_close(found, separately(reference), rtol=2e-6, atol=2e-6)
    wide = PackedCausalLM(small("mistral", attention, head_dim=8, sliding_window=50), 8).eval()
    assert (scores(wide, make_row(candidates())).loss - found).abs().max() > 1e-4


def test_a_window_that_only_the_mask_knows_is_refused_where_it_would_be_ignored():
    fields = {"head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2}
    models = {a: small("phimoe", a, **fields) for a in ("packed", "sdpa", "eager")}
    found = {
        a: scores(PackedCausalLM(m, 8).eval(), make_row(candidates())).loss
        for a, m in models.items()
    }
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=2e-6, atol=2e-6)
    assert (found["packed"] - found["eager"]).abs().max() > 1e-4
    config = models["packed"].config
    with pytest.raises(ValueError, match=r"windows of 5 tokens.*sdpa, or data.max_tokens up to 5"):
        check_window(config, "packed", 6)
    check_window(config, "packed", 5)
    check_window(config, "sdpa", 6)
    check_window(small("mistral", head_dim=8, sliding_window=5).config, "packed", 6)


def test_capped_attention_scores_are_refused():
    fields = {"head_dim": 8, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8}
    model = PackedCausalLM(small("gemma2", "packed", **fields), 8).eval()
    with pytest.raises(ValueError, match=r"caps its scores.*set model\.attention to eager"):
        scores(model, make_row(candidates()))
    eager = PackedCausalLM(small("gemma2", "eager", **fields), 8).eval()
    packed = scores(eager, make_row(candidates())).loss
    torch.testing.assert_close(packed, separately(eager), rtol=2e-6, atol=2e-6)


def test_scoring_switches_dropout_off_and_draws_no_random_numbers():
    from slap_ds.engine import TorchEngine

    engine = TorchEngine.__new__(TorchEngine)
    lm = small("llama", attention_dropout=0.5)
    engine.model = PackedCausalLM(lm, 8).train()
    engine.device, engine.hidden_size = torch.device("cpu"), 16
    rows = [make_row(candidates()), PackedRow.empty()]
    state = torch.get_rng_state()
    first, again = engine.score(rows, ScoreRequest()), engine.score(rows, ScoreRequest())
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.model.training
    torch.testing.assert_close(first.loss, separately(engine.model.eval()))


class Alone:
    """An engine of one packed model."""

    def __init__(self, model):
        self.model = model

    def score(self, rows, request):
        return scores(self.model, rows[0])

    def own_loss(self, row):
        with torch.no_grad():
            return float(self.model(row, "own"))


ENCODER = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_head_that_is_not_the_model_s_is_refused(kind):
    config = load_config(None, {"model_type": kind, "is_decoder": True, **ENCODER})
    lm = load_model(None, config, dtype="float32", attention="sdpa", seed=0)
    with pytest.raises(ValueError, match=f"{kind} computes its logits in another way than by one"):
        check_head(Alone(PackedCausalLM(lm, 8).eval()), config, "float32")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 3.0}),
        ("llama4_text", {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}),
    ],
)
def test_the_loss_is_that_of_the_model_s_own_logits(kind, changes):
    lm = small(kind, **changes)
    check_head(Alone(PackedCausalLM(lm, 8).eval()), lm.config, "float32")
