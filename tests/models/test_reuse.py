"""What forward reuse refuses, what it holds and when it lets go; quotas on token shares."""

import copy
import pickle
import weakref

import pytest
import torch
import transformers

from slap_ds.data.packing import Candidate, make_row
from slap_ds.models.blocks import find_blocks, own
from slap_ds.models.causal import PackedCausalLM, enable_checkpointing
from slap_ds.models.host_copies import Arriving, HostCopies
from slap_ds.models.load import load_config, load_model
from slap_ds.models.reuse import BlockInputs, install
from slap_ds.scoring import ScoreRequest
from slap_ds.selection import ScoredBatch, make_selector, select, select_balanced
from slap_ds.train.record import train_step
from slap_ds.train.run import prepare
from tests.recipes import tiny_config, tiny_model

pytestmark = pytest.mark.lane

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


def test_a_block_stays_what_it_was():
    """Its class is still one of transformers', under the same name; so are the weights' names."""
    plain, lm = small(), small()
    install(lm)
    own = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    for block in find_blocks(lm):
        assert isinstance(block, own)
        assert type(block) is not own
        assert (type(block).__name__, type(block).__module__) == (own.__name__, own.__module__)
    assert repr(lm) == repr(plain)
    assert list(lm.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in lm.named_modules()] == [n for n, _ in plain.named_modules()]
    assert lm.config.to_dict() == plain.config.to_dict()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in lm.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_has_blocks_of_their_own_class_and_gives_the_same(copied, tmp_path):
    lm = small(attention="sdpa").eval()
    install(lm)
    twin = copied(lm)
    own = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    assert {type(block) for block in find_blocks(twin)} == {own}
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = lm(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        lm.save_pretrained(tmp_path)
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(saved(ids).logits, expected)


def test_checkpointing_keeps_one_input_a_block_and_gives_the_same_gradients():
    gradients, kept, saved = [], [], []
    for checkpointed in (False, True):
        lm = small().train()
        if checkpointed:
            enable_checkpointing(lm)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss = PackedCausalLM(lm, 8)(row(7, 5), "train")
        loss.backward()
        gradients.append([p.grad for p in lm.parameters()])
        kept.append(len(saved))
        assert not any(getattr(m, "gradient_checkpointing", False) for m in lm.modules())
    assert kept[1] < kept[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Unrecorded(torch.nn.Module):
    """Stands in a block's place and computes it behind the boundary's back."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **named):
        return type(self.block).forward(self.block, *args, **named)


def plant(lm, fault):
    """`lm`, set up for reuse and then built otherwise than reuse expects."""
    inputs = install(lm)
    layers = lm.model.layers
    if fault == "not recorded":
        layers[1] = Unrecorded(layers[1])
    elif fault == "twice":
        layers[2] = layers[1]
    else:
        inner = layers[1].slap_boundary.call
        layers[1].slap_boundary = copy.copy(inputs)
        layers[1].slap_boundary.call = lambda block, run, args, named: inner(
            block, run, (args[0] * 2, *args[1:]), named
        )
    return inputs


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("not recorded", "3 of 4 block boundaries were met"),
        ("twice", "2 of 4 block boundaries were met"),
        ("between", "a block was not given what the block before it returned"),
    ],
)
def test_a_forward_that_passes_the_boundaries_otherwise_is_refused(fault, told):
    lm = small()
    inputs = plant(lm, fault)
    model = PackedCausalLM(lm, 8, inputs).train()
    inputs.start_scoring()
    with torch.no_grad():
        model(row(7, 5), "score", ScoreRequest())
    version = transformers.__version__
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM of transformers {version}: {told}"):
        inputs.check(lm)


class Tupled(torch.nn.Module):
    """A block that returns its hidden states in a tuple, as those of older models do."""

    def __init__(self, beside):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.beside = beside

    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.linear(hidden_states)), self.beside


def through(blocks, hidden):
    for block in blocks:
        hidden = block(hidden_states=hidden)[0]
    return hidden


@pytest.mark.parametrize("beside", [None, torch.ones(1)])
def test_blocks_that_return_tuples(beside):
    torch.manual_seed(0)
    blocks = [Tupled(beside) for _ in range(3)]
    first, weights = torch.randn(1, 7, 6, requires_grad=True), [b.linear.weight for b in blocks]
    expected = torch.autograd.grad(through(blocks, first).square().sum(), [first, *weights])
    inputs = BlockInputs(blocks, on_host=False)
    for block in blocks:
        own(block, inputs)
    inputs.start_scoring()
    inputs.enter(row(7))
    with torch.no_grad():
        through(blocks, first)
    if beside is not None:
        with pytest.raises(ValueError, match="return more than hidden states"):
            inputs.check(torch.nn.ModuleList(blocks))
        return
    inputs.check(torch.nn.ModuleList(blocks))
    inputs.start_replay([row(7)])
    inputs.enter(row(7))
    through(blocks, first).square().sum().backward()
    for wanted, found in zip(expected, [first, *weights], strict=True):
        assert torch.equal(found.grad, wanted)


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
    scored = row(7, 5, 9)
    with torch.no_grad():
        model(scored, "score", ScoreRequest())
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


@pytest.mark.parametrize("method", ["slap", "hard"])
@pytest.mark.parametrize("holders", [1, 2, 8])
def test_quotas_level_the_holders(method, holders):
    from slap_ds.data.packing import deal

    selector = make_selector({"method": method, "slap": {}})
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
    selector = make_selector({"method": "slap", "slap": {}})
    batch, _ = make_batch(10, 0)
    tokens = torch.tensor([1000] + [1] * 9)  # one holder cannot come down to its share
    holder = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    found = select_balanced(
        selector, batch, 9, torch.Generator().manual_seed(0),
        holder=holder, tokens=tokens, holders=2, slack=0.02,
    )  # fmt: skip
    assert len(found.picks.unique()) == 9


def test_one_row_of_block_inputs_is_on_the_device_at_a_time(monkeypatch):
    lm = small()
    inputs = install(lm, on_host=True)
    model = PackedCausalLM(lm, 16, inputs).train()
    inputs.start_scoring()
    rows = [row(5, 4, 6), row(7, 3, start=3)]
    with torch.no_grad():
        for one in rows:
            model(one, "score", ScoreRequest())
    inputs.start_replay(rows)
    inputs.enter(rows[0])
    held = [weakref.ref(x.tensor) for x in inputs._current]
    assert len(held) == 4
    assert all(ref() is not None for ref in held)
    cat = torch.cat
    seen = []

    def load(pieces, *rest):
        seen.append(sum(ref() is not None for ref in held))
        return cat(pieces, *rest)

    monkeypatch.setattr(torch, "cat", load)
    inputs.enter(rows[1])
    assert seen == [0] * 4


class LateCopies(HostCopies):
    """Whose values come no earlier than they are waited for."""

    def load(self, pieces, device):
        values = torch.cat(list(pieces))
        late = torch.full_like(values, torch.nan)
        return Arriving(late, lambda: late.copy_(values))


def test_block_inputs_are_used_only_after_they_have_come_back():
    """On a GPU they come on a stream of their own, while the rows before are computed."""
    gradients = {}
    for copies in (HostCopies(), LateCopies()):
        lm = small()
        inputs = install(lm, on_host=True)
        inputs.copies = copies
        model = PackedCausalLM(lm, 16, inputs).train()
        rows = [row(5, 4, 6), row(7, 3, start=3)]
        inputs.start_scoring()
        with torch.no_grad():
            for one in rows:
                model(one, "score", ScoreRequest())
        inputs.start_replay(rows)
        for one in rows:
            model(one, "train").backward()
        inputs.stop()
        found = [p.grad for p in model.parameters()]
        gradients[type(copies)] = torch.cat([g.flatten() for g in found])
    assert torch.isfinite(gradients[LateCopies]).all()
    assert torch.equal(gradients[LateCopies], gradients[HostCopies])


def doubled_in_place(lm):
    rotary, plain = lm.model.rotary_emb, lm.model.rotary_emb.forward
    rotary.forward = lambda x, *rest, **named: plain(x.mul_(2), *rest, **named)


@pytest.mark.parametrize(
    ("kind", "change", "skipped"),
    [("llama", None, True), ("llama", doubled_in_place, False), ("granite", None, False)],
)
def test_an_embedding_is_left_out_only_where_the_first_block_is_given_just_that(
    kind, change, skipped
):
    """Granite scales it; a replayed row's gradients are those of an ordinary one in any case."""
    gradients, called = [], {False: 0, True: 0}
    for replayed in (False, True):
        lm = small(kind, **({"embedding_multiplier": 3.0} if kind == "granite" else {})).train()
        inputs = install(lm)
        if change is not None:
            change(lm)
        model = PackedCausalLM(lm, 8, inputs)
        if replayed:
            inputs.start_scoring()
            with torch.no_grad():
                model(row(7, 5), "score", ScoreRequest())
            inputs.start_replay([row(7, 5)])
        lm.get_input_embeddings().register_forward_hook(
            lambda *_, replayed=replayed: called.__setitem__(replayed, called[replayed] + 1)
        )
        loss = model(row(7, 5), "train")
        assert called == {False: 1, True: int(replayed and not skipped)}
        loss.backward()
        gradients.append([p.grad for p in lm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_optimizer_steps_without_block_inputs(tmp_path):
    config = tiny_config(
        tiny_model(tmp_path / "model"),
        tmp_path / "run",
        steps=1,
        engine={"kind": "torch"},
        model={"gradient_checkpointing": True},
        step={"forward": "reuse"},
    )
    run = prepare(config)
    take, inputs, held = run.engine._step, run.engine._inputs(), []

    def step():
        held.append((len(inputs._cuts), len(inputs._current), len(inputs._recorded)))
        return take()

    run.engine._step = step
    assert train_step(run, 0).metrics["boundary_bytes"] > 0
    assert held == [(0, 0, 0)]
