"""Mixtures of experts: the routers' balance loss by transformers' own, and what a token meets."""

import pytest
import torch

from slap_ds.data.packing import Candidate, make_row
from slap_ds.models.causal import PackedCausalLM, count_parameters, enable_checkpointing
from slap_ds.models.experts import RouterBalance, active_parameters
from slap_ds.models.load import load_config, load_model
from slap_ds.models.reuse import install
from slap_ds.scoring import ScoreRequest
from tests.models.test_reuse import SMALL

pytestmark = pytest.mark.lane

KINDS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "head_dim": 8,
    },
}
WEIGHTS = (1.0, 2.5, 0.5)
COEFFICIENT = 0.7  # large, so that a loss without it is far off


def small(kind, **changes):
    fields = {"model_type": kind, **SMALL, **KINDS.get(kind, {}), **changes}
    config = load_config(None, fields)
    return load_model(None, config, dtype="float32", attention="packed", seed=3)


def balanced(kind, **changes):
    return small(kind, output_router_logits=True, router_aux_loss_coef=COEFFICIENT, **changes)


def packed(lm, inputs=None):
    """As the engines make it."""
    model = PackedCausalLM(lm, 8, inputs)
    model.balance = RouterBalance.of(lm)
    return model


def samples(lengths=(9, 5, 13)):
    """Half of each is its answer."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for position, (length, weight) in enumerate(zip(lengths, WEIGHTS, strict=True)):
        ids = torch.randint(3, 50, (length,), generator=generator).numpy()
        mask = torch.arange(length).numpy() >= length // 2
        found.append(Candidate(position, ids, mask, weight))
    return found


def by_transformers(kind, ours=(0, 1, 2)):
    """Each sample by itself, its mean loss and balance loss as transformers adds them."""
    lm = balanced(kind)
    lm.set_attn_implementation("eager")
    for sample in (samples()[i] for i in ours):
        ids = torch.tensor(sample.ids)[None].long()
        labels = ids.masked_fill(~torch.tensor(sample.mask), -100)
        trained = int((labels[:, 1:] >= 0).sum())
        (lm(ids, labels=labels).loss * trained * sample.weight / 10).backward()
    return lm


def same_gradients(found, expected):
    names = dict(expected.named_parameters())
    assert any("gate.weight" in name for name in names)
    for name, weight in found.named_parameters():
        torch.testing.assert_close(
            weight.grad, names[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_transformers(kind, checkpointed):
    lm = balanced(kind).train()
    if checkpointed:
        enable_checkpointing(lm)
    (packed(lm)(make_row(samples()), "train") / 10).backward()
    same_gradients(lm, by_transformers(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_rows_have_the_same_gradients(kind):
    lm = balanced(kind).train()
    inputs = install(lm)
    model = packed(lm, inputs)
    inputs.start_scoring()
    with torch.no_grad():
        for row in (make_row(samples()[:2]), make_row(samples()[2:])):
            model(row, "score", ScoreRequest())
    picked = make_row([samples()[2], samples()[0]])
    inputs.start_replay([picked])
    (model(picked, "train") / 10).backward()
    same_gradients(lm, by_transformers(kind, (2, 0)))


@pytest.mark.parametrize("kind", KINDS)
def test_its_value_is_that_of_transformers(kind):
    """Summed over the samples, each times the weights of its trained tokens."""
    lm = balanced(kind).train()
    model = packed(lm, inputs := install(lm))
    model(make_row(samples()), "train")
    trained = model.balance.take()
    assert model.balance.take() == 0.0
    inputs.start_scoring()
    with torch.no_grad():
        model(make_row(samples()), "score", ScoreRequest())
    row = make_row([samples()[2], samples()[0]])
    inputs.start_replay([row])
    model(row, "train")
    replayed = model.balance.take()
    inputs.stop()
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        values = [
            float(lm(torch.tensor(s.ids)[None].long()).aux_loss) * s.weight * int(s.mask[1:].sum())
            for s in samples()
        ]
    assert trained == pytest.approx(sum(values), rel=1e-5)
    assert replayed == pytest.approx(values[2] + values[0], rel=1e-5)


def test_no_balance_loss_is_trained_that_was_not_asked_for():
    lm = small("mixtral", router_aux_loss_coef=COEFFICIENT)
    assert packed(lm).balance is None
    plain, rows = balanced("mixtral").train(), make_row(samples())
    for each in (lm, plain):
        (packed(each.train())(rows, "train") / 10).backward()
    gates = [each.model.layers[0].mlp.gate.weight.grad for each in (lm, plain)]
    assert (gates[0] - gates[1]).norm() > 0.01 * gates[0].norm()


def test_routers_that_the_model_does_not_show_are_refused(monkeypatch):
    lm = balanced("mixtral")
    monkeypatch.setattr(type(lm), "_can_record_outputs", {})
    with pytest.raises(ValueError, match="MixtralForCausalLM does not say how its routers' "):
        packed(lm)


def test_router_noise_is_refused_for_reuse():
    with pytest.raises(ValueError, match=r"found router_jitter_noise = 0\.1: set it to 0"):
        install(small("mixtral", router_jitter_noise=0.1))


@pytest.mark.parametrize(
    ("kind", "idle"),
    # layers * experts that are not chosen * three products of hidden size by the expert's
    [("llama", 0), ("mixtral", 3 * 2 * 3 * 16 * 24), ("qwen3_moe", 3 * 2 * 3 * 16 * 12)],
)
def test_a_token_meets_the_experts_chosen_for_it(kind, idle):
    lm = small(kind)
    assert count_parameters(lm) - active_parameters(lm) == idle
