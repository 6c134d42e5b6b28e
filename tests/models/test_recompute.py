"""A replayed block is recomputed as torch's own checkpointing does it: the same work and bits."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slap_ds.config.schema import LoraConfig
from slap_ds.models.blocks import find_blocks
from slap_ds.models.causal import PackedCausalLM, enable_checkpointing
from slap_ds.models.lora import add_adapter
from slap_ds.models.recompute import Recompute
from slap_ds.models.reuse import install
from slap_ds.scoring import ScoreRequest
from tests.models.test_reuse import row, small

CASES = {
    "llama": ("llama", None),
    "qwen3": ("qwen3", None),
    "phi3": ("phi3", None),
    # Normed after the product: nothing can be left out, by torch neither.
    "olmo2": ("olmo2", None),
    "lora": ("llama", LoraConfig(r=2)),
    "lora of attention": ("llama", LoraConfig(r=2, target_modules=["q_proj"])),
    "dora": ("llama", LoraConfig(r=2, use_dora=True)),
}


def build(kind, lora):
    lm = small(kind, "sdpa", head_dim=8) if kind != "phi3" else small(kind, "sdpa")
    if lora is not None:
        pytest.importorskip("peft")
        add_adapter(lm, lora, seed=0)
    return lm.train()


def products(work):
    """FLOPs of `work()`'s matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def gradients(lm):
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_replay_costs_a_checkpointed_step_less_its_forward(case):
    full = build(*CASES[case])
    enable_checkpointing(full)
    model = PackedCausalLM(full, 8)
    ids = row(9, 6)
    step = products(lambda: model(ids, "train").backward())
    with torch.no_grad():
        forward = products(lambda: full.base_model(ids.input_ids, position_ids=ids.position_ids))
        # Outside the blocks, where replayed rows compute it too; a product up to transformers 5.17.
        rotary = full.base_model.rotary_emb
        forward -= products(lambda: rotary(torch.zeros(1, 15, 16), ids.position_ids))

    reused = build(*CASES[case])
    inputs = install(reused)
    model = PackedCausalLM(reused, 8, inputs)
    costs = []
    for _ in range(3):  # the first one learns what can be left out
        reused.zero_grad()
        inputs.start_scoring()
        with torch.no_grad():
            model(ids, "score", ScoreRequest())
        inputs.start_replay([ids])
        costs.append(products(lambda: model(ids, "train").backward()))
    assert costs[1:] == [step - forward] * 2
    assert costs[0] >= costs[1]
    expected, found = gradients(full), gradients(reused)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Moody(torch.nn.Module):
    """Which layer is its last, and whether that one's value is needed, depends on its mood."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Linear(5, 5, bias=False) for _ in range(2))

    def forward(self, x, mood):
        if mood == "other":
            return x + self.b(torch.tanh(self.a(x)))
        if mood == "needed":
            return x + torch.tanh(self.a(self.b(x)))
        return x + self.a(torch.tanh(self.b(x)))


@pytest.mark.parametrize("later", ["as learnt", "other", "needed"])
def test_a_product_that_is_needed_after_all_is_computed(later):
    torch.manual_seed(0)
    block, again = Moody(), Recompute()
    x = torch.randn(2, 5, requires_grad=True)
    leaves = [x, *block.parameters()]
    for mood in ("as learnt", later, later, "as learnt"):
        whole = block(x, mood)
        upstream = torch.randn_like(whole)
        expected = torch.autograd.grad(whole, leaves, upstream)
        out = again(block, partial(block, x, mood))
        found = torch.autograd.grad(out, leaves, upstream)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    assert (again._last[block] is block.a) == (later == "as learnt")


def test_the_layer_is_as_before_also_after_an_error():
    block, again = Moody(), Recompute()
    again(block, lambda: block(torch.randn(2, 5, requires_grad=True), "as learnt"))
    with pytest.raises(ZeroDivisionError):
        again(block, lambda: 1 / 0)
    assert not any("forward" in vars(module) for module in block.modules())


def test_blocks_know_their_last_product():
    lm = small()
    inputs = install(lm)
    model = PackedCausalLM(lm, 8, inputs).train()
    inputs.start_scoring()
    with torch.no_grad():
        model(row(7), "score", ScoreRequest())
    inputs.start_replay([row(7)])
    model(row(7), "train").backward()
    last = inputs._recompute._last
    assert [last[block] for block in find_blocks(lm)] == [b.mlp.down_proj for b in find_blocks(lm)]
