"""What forward reuse refuses, what it holds and when it lets go; quotas on token shares."""

import pytest
import torch

from slap_ds.data.packing import Candidate, make_row
from slap_ds.models.causal import PackedCausalLM
from slap_ds.models.load import load_config, load_model
from slap_ds.models.reuse import find_blocks, install
from slap_ds.selection import ScoredBatch, make_selector, select, select_balanced

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(model_type="llama", attention="packed", **changes):
    fields = {"model_type": model_type, **SMALL, **changes}
    return load_model(None, load_config(None, fields), dtype="float32", attention=attention, seed=0)


def row(*lengths, start=0):
    g = torch.Generator().manual_seed(1)
    samples = []
    for i, n in enumerate(lengths):
        ids = torch.randint(3, 50, (n,), generator=g).numpy()
        samples.append(Candidate(start + i, ids, ids > 0))
    return make_row(samples)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "glm", "phi3"])
def test_blocks_are_found(model_type):
    assert len(find_blocks(small(model_type, "sdpa", head_dim=8))) == 3


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.1.*step\.forward: separate"):
        install(small(attention_dropout=0.1))


def test_a_model_without_one_list_of_blocks_is_refused():
    with pytest.raises(ValueError, match="has 0"):
        install(torch.nn.Linear(2, 2))


def test_boundaries_are_kept_and_released():
    lm = small()
    inputs = install(lm)
    model = PackedCausalLM(lm, 8, inputs).train()
    inputs.start_scoring()
    from slap_ds.scoring import Wants

    scored = row(7, 5, 9)
    with torch.no_grad():
        model(scored, "score", Wants())
    chosen = make_row(
        [
            Candidate(2, scored.input_ids[0, 12:].numpy(), scored.input_ids[0, 12:].numpy() > 0),
            Candidate(0, scored.input_ids[0, :7].numpy(), scored.input_ids[0, :7].numpy() > 0),
        ]
    )
    inputs.start_replay([chosen])
    # Boundaries before each of 3 blocks and after the last: tokens * E * (L + 1) * 4 bytes.
    assert inputs.peak_bytes == 21 * 16 * 4 * 4
    model(chosen, "train").backward()
    found = [p.grad.clone() for p in model.parameters()]
    inputs.stop()
    assert not inputs._recorded
    assert not inputs._cuts
    assert not inputs._current
    model.zero_grad()
    model(chosen, "train").backward()
    for grad, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(grad, p.grad)


def make_batch(n, seed):
    g = torch.Generator().manual_seed(seed)
    batch = ScoredBatch(torch.rand(n, generator=g) * 4, torch.randn(n, 8, generator=g))
    tokens = (torch.randn(n, generator=g).abs() * 150 + 20).long()
    return batch, tokens


OPTIONS = {"strata": 4, "strata_by": "quantile", "budgets": "sampled"}
OPTIONS |= {"temperature": 1.0, "across_strata": True, "reweight": "none"}


@pytest.mark.parametrize("method", ["slap", "hard"])
@pytest.mark.parametrize("holders", [1, 2, 8])
def test_quotas_level_the_holders(method, holders):
    from slap_ds.data.packing import deal

    selector = make_selector({**OPTIONS, "method": method})
    for seed in range(5):
        n = 64 * holders
        batch, tokens = make_batch(n, seed)
        holder = torch.empty(n, dtype=torch.int64)
        for h, share in enumerate(deal(tokens.numpy(), holders)):
            holder[share] = h
        free = select(selector, batch, n // 2, torch.Generator().manual_seed(3))
        found = select_balanced(
            selector, batch, n // 2, torch.Generator().manual_seed(3),
            holder=holder, tokens=tokens, holders=holders, slack=0.02,
        )  # fmt: skip
        assert len(found.picks.unique()) == n // 2
        load = torch.bincount(holder[found.picks], tokens[found.picks].double(), holders)
        assert load.max() / load.mean() <= 1.05
        common = set(found.picks.tolist()) & set(free.picks.tolist())
        assert len(common) >= 0.75 * n // 2
        if holders == 1:
            assert found.picks.tolist() == free.picks.tolist()


def test_quotas_never_lose_a_pick_when_candidates_are_scarce():
    selector = make_selector({**OPTIONS, "method": "slap"})
    batch, _ = make_batch(10, 0)
    tokens = torch.tensor([1000] + [1] * 9)  # one holder cannot come down to its share
    holder = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    found = select_balanced(
        selector, batch, 9, torch.Generator().manual_seed(0),
        holder=holder, tokens=tokens, holders=2, slack=0.02,
    )  # fmt: skip
    assert len(found.picks.unique()) == 9
