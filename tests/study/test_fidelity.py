"""The fidelity of choices, against plain autograd over single samples without packing."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slap_ds.cli import main
from slap_ds.cli.evidence import label_and_settings
from slap_ds.config.file import write_config
from slap_ds.data.stream import CandidateStream
from slap_ds.study import fidelity as module
from slap_ds.study.fidelity import Gradients, Question, Tally, fidelity, step_gradient
from slap_ds.train.inputs import read_inputs
from tests.recipes import tiny_config, tiny_model

HARD_FIRST = {"hard": True, "easy": False}
QUESTION = Question(states=(0,), batches=3, share=0.5)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("fidelity")
    sections = {"batch": {"candidates": 6}, "data": {"max_tokens": 96}}
    config = tiny_config(tiny_model(root / "model"), root / "run", **sections)
    methods = {
        name: config.model_copy(
            update={"selection": config.selection.model_copy(update={"method": name})}
        )
        for name in ("hard", "easy", "slap")
    }
    return config, methods, fidelity(config, methods, QUESTION)


def plain_gradient(lm, sample):
    """Of the loss of one sample, summed over its trained tokens, by transformers and autograd."""
    ids, mask = (torch.from_numpy(np.array(x)) for x in (sample.ids, sample.mask))
    logits = lm(input_ids=ids[None].long()).logits[0, :-1].double()
    losses = functional.cross_entropy(logits, ids[1:].long(), reduction="none")
    total = losses[mask[1:].bool()].sum()
    found = torch.autograd.grad(total, list(lm.parameters()))
    return torch.cat([g.double().reshape(-1) for g in found]), float(total.detach())


def test_numbers_against_plain_autograd(setup):
    config, _, rows = setup
    inputs = read_inputs(config, write_rejects=False)
    lm = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    store, held = inputs.train, inputs.eval
    generator = np.random.Generator(np.random.Philox(key=[0, len(held)]))
    chosen = generator.permutation(len(held))[: module.HELD_OUT]
    held_out = sum(plain_gradient(lm, held[int(i)])[0] for i in chosen)
    found = {name: {"error": 0.0, "gap": 0.0, "aligned": [], "tokens": []} for name in HARD_FIRST}
    for indices in CandidateStream(len(store), 6, config.seed + 1, steps=3):
        each = [plain_gradient(lm, store[int(i)]) for i in indices]
        g = torch.stack([gradient for gradient, _ in each])
        n = torch.tensor([float(store.trained_tokens[i]) for i in indices])
        mean_loss = torch.tensor([loss for _, loss in each]) / n
        lengths = torch.tensor([float(store.lengths[i]) for i in indices])
        whole, most = g.sum(0) / n.sum(), 0.5 * float(lengths.sum())
        for name, hard_first in HARD_FIRST.items():
            order = mean_loss.argsort(descending=hard_first)
            fits = [k for k in range(1, 6) if float(lengths[order[:k]].sum()) <= most or k == 1]
            picks = order[: max(fits)]
            picked, sums = g[picks].sum(0) / n[picks].sum(), found[name]
            sums["error"] += float((picked - whole).square().sum())
            sums["gap"] = sums["gap"] + picked - whole
            sums["aligned"].append(float(functional.cosine_similarity(picked, held_out, 0)))
            sums["tokens"].append(float(lengths[picks].sum() / lengths.sum()))
    by_name = {row["method"]: row for row in rows}
    for name, sums in found.items():
        row = by_name[name]
        assert row["aligned"] == pytest.approx(np.mean(sums["aligned"]), abs=1e-4)
        assert row["tokens"] == pytest.approx(np.mean(sums["tokens"]))
        assert row["cost"] == pytest.approx(0.25 + 0.75 * np.mean(sums["tokens"]))
    # Errors and biases are told in random's; the ratio of two methods is free of that.
    hard, easy = (by_name[name] for name in HARD_FIRST)
    errors = [sums["error"] for sums in found.values()]
    biases = [float(sums["gap"].square().sum()) for sums in found.values()]
    assert hard["error"] / easy["error"] == pytest.approx(errors[0] / errors[1], rel=1e-3)
    assert hard["bias"] / easy["bias"] == pytest.approx(biases[0] / biases[1], rel=1e-3)
    assert by_name["slap"]["tokens"] <= 0.5
    assert by_name["random"]["error"] == by_name["random"]["bias"] == pytest.approx(1)
    assert by_name["random"]["cost"] == by_name["random"]["tokens"] <= 0.5
    everything = by_name["all"]
    assert (everything["error"], everything["bias"]) == pytest.approx((0, 0), abs=1e-9)


def test_the_same_twice(setup):
    config, methods, rows = setup
    assert fidelity(config, methods, QUESTION) == rows


def test_tally_and_weights_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 7, generator=generator)
    tokens = torch.tensor([1.0, 2, 3, 4, 5])
    picks, weights = torch.tensor([3, 0]), torch.tensor([0.5, 2.0])
    found = step_gradient(gradients, tokens, picks, weights)
    by_hand = (0.5 * gradients[3] + 2 * gradients[0]) / (0.5 * 4 + 2 * 1)
    torch.testing.assert_close(found, by_hand)
    tally = Tally()
    for _ in range(2):
        tally.add(found, gradients[1], gradients[2], 0.4)
    assert tally.error == pytest.approx(2 * float(((found - gradients[1]) ** 2).sum()))
    torch.testing.assert_close(torch.as_tensor(tally.mean), 2 * found)


def test_sketches_keep_inner_products_of_the_last_blocks(setup):
    config, *_ = setup
    lm = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)

    class Model:
        def __init__(self):
            self.lm = lm

        def parameters(self):
            return lm.parameters()

    sketch = Gradients(Model(), 1)
    names = {id(p): name for name, p in lm.named_parameters()}
    kept = {names[id(p)] for p in sketch.parameters}
    assert {name.split(".")[2] for name in kept if ".layers." in name} == {"1"}
    assert "lm_head.weight" in kept
    assert "model.norm.weight" in kept
    generator = torch.Generator().manual_seed(1)
    a = [torch.randn(p.shape, generator=generator) for p in sketch.parameters]
    b = [x + torch.randn(x.shape, generator=generator) for x in a]

    def project(values):
        out = torch.zeros(module.SKETCH)
        for value, (place, sign) in zip(values, sketch.places, strict=True):
            out.index_add_(0, place, value.reshape(-1) * sign)
        return out

    exact = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    assert float(project(a) @ project(b)) == pytest.approx(exact, rel=0.02)


def test_command_writes_its_numbers(setup, tmp_path, capsys):
    config, *_ = setup
    write_config(config, tmp_path / "run.yaml")
    arguments = ["fidelity", str(tmp_path / "run.yaml"), "--states", "0", "2", "--batches", "2"]
    arguments += ["--blocks", "1", "--method", "easy:selection.method=easy"]
    main([*arguments, "--json", str(tmp_path / "out.json"), "--batch.candidates", "5"])
    found = json.loads((tmp_path / "out.json").read_text())
    names = [(row["state"], row["method"]) for row in found["rows"]]
    assert names == [(s, m) for s in (0, 2) for m in ("all", "random", "easy")]
    assert found["rows"][0]["held_out_loss"] > found["rows"][3]["held_out_loss"]
    assert "easy" in capsys.readouterr().out


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="ascending"):
        Question(states=(3, 1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Question(share=1.0)
    with pytest.raises(ValueError, match="expected LABEL:KEY=VALUE"):
        label_and_settings("hard")
    assert label_and_settings("a:b=1,c=2") == ("a", "b=1,c=2")
