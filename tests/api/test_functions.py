"""slap_ds.select, score, train and register_selector, each against something independent."""

import gc
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import slap_ds
from slap_ds import selection
from slap_ds.jsonl import read_lines
from tests.recipes import picks, run_config, tiny_config, tiny_model


@pytest.fixture(scope="module", params=["llama", "glm"])
def model(request, tmp_path_factory):
    path = tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(selection, "_registered", {})


def padded(lengths=(12, 7, 9)):
    """Samples of these lengths, padded on the right; the first three tokens are a prompt."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 2000, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def alone(batch):
    """Each sample of a padded batch, and its labels."""
    for ids, mask, labels in zip(*batch.values(), strict=True):
        yield ids[mask.bool()][None], labels[mask.bool()][None]


def test_scores_are_those_of_each_sample_alone(model):
    """Loss by transformers, the sketch by autograd: the mean gradient by the head's inputs."""
    batch = padded()
    scored = slap_ds.score(model, batch, curvature="none", unit=False)
    assert scored.response_tokens.tolist() == [9, 4, 6]
    for i, (ids, labels) in enumerate(alone(batch)):
        hidden = model.model(input_ids=ids).last_hidden_state.detach().requires_grad_()
        loss = F.cross_entropy(model.lm_head(hidden)[0, :-1], labels[0, 1:])
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert float(scored.loss[i]) == pytest.approx(float(loss.detach()), rel=1e-5)
        torch.testing.assert_close(scored.sketch[i], gradient[0].sum(0), rtol=1e-4, atol=1e-7)


def test_scores_are_the_same_of_padded_left_and_packed_batches(model):
    batch = padded()
    wanted = slap_ds.score(model, batch)
    left = {name: x.flip(1) for name, x in batch.items()}
    for i, length in enumerate((12, 7, 9)):  # flipped back, sample by sample
        for name in left:
            left[name][i, -length:] = batch[name][i, :length]
    rows = [*alone(batch)]
    packed = {
        "input_ids": torch.cat([ids for ids, _ in rows], 1),
        "labels": torch.cat([labels for _, labels in rows], 1),
        "position_ids": torch.cat([torch.arange(ids.shape[1]) for ids, _ in rows])[None],
    }
    for other in (left, packed):
        found = slap_ds.score(model, other)
        torch.testing.assert_close(found.loss, wanted.loss)
        torch.testing.assert_close(found.sketch, wanted.sketch)
        assert found.ids.tolist() == wanted.ids.tolist()


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.lm_head.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    slap_ds.score(model, padded())
    assert model.training
    assert not model.lm_head.training
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()


def test_what_cannot_be_scored_is_one_line(model):
    batch = padded()
    wrong = {
        "no labels": {"input_ids": batch["input_ids"]},
        "not the tokens": {**batch, "labels": batch["labels"].roll(-1, 1)},
        "no sample": {**batch, "labels": torch.full_like(batch["labels"], -100)},
        "holes": {**batch, "attention_mask": batch["attention_mask"] * (torch.arange(12) != 5)},
        "shape": {**batch, "attention_mask": batch["attention_mask"][:, None]},
    }
    for words, given in wrong.items():
        with pytest.raises(ValueError, match=words) as error:
            slap_ds.score(model, given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="sketchy: unknown key"):
        slap_ds.score(model, batch, sketchy="hvp")


def test_select_is_what_the_trainer_picks_by(tmp_path):
    """One step of `slap-ds train`: the same scores and generator give the same picks."""
    path = tiny_model(tmp_path / "model")
    sections = {"engine": {"kind": "torch"}, "steps": 1, "optimizer": {"warmup_steps": 0}}
    run_config(tiny_config(path, tmp_path / "run", **sections))
    from slap_ds.data.stream import CandidateStream
    from slap_ds.train.inputs import read_inputs
    from slap_ds.train.step import step_seed

    config = tiny_config(path, tmp_path / "other", **sections)
    store = read_inputs(config).train
    indices = next(CandidateStream(len(store), 16, config.seed, steps=1))
    samples = [store[int(i)] for i in indices]
    ids = torch.cat([torch.from_numpy(s.ids.astype("int64")) for s in samples])
    trained = torch.cat([torch.from_numpy(s.mask.copy()) for s in samples])
    batch = {
        "input_ids": ids[None],
        "labels": ids.masked_fill(~trained, -100)[None],
        "position_ids": torch.cat([torch.arange(len(s.ids)) for s in samples])[None],
    }
    model = AutoModelForCausalLM.from_pretrained(path)
    scored = slap_ds.score(model, batch, seed=config.seed)
    chosen = slap_ds.select(scored, keep=0.6, seed=step_seed(config.seed, 0))
    ids_picked = store.sample_ids[indices[chosen.picks.numpy()]].tolist()
    assert ids_picked == picks(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"losses": [[1.0]]}, r"losses have shape \(1, 1\)"),
        ({"losses": [1.0, 2.0], "sketches": [[1.0]]}, "one row each"),
        ({"losses": [1.0, 2.0], "sketches": [1.0, 2.0]}, r"expected \(N, D\)"),
        ({"losses": [1.0, 2.0]}, "needs sketch of each candidate"),
        ({"losses": [1.0], "method": "sampled"}, "needs response_tokens, tokens"),
        ({"losses": [1.0], "method": "harder"}, "expected one of adacore"),
        ({"losses": [1.0], "method": "hard", "k": 3}, "selection.options holds k"),
        ({"losses": [1.0], "method": "hard", "keep": 0}, "keep"),
        ({"losses": ["x"], "method": "hard"}, "cannot be made a tensor"),
        ({"losses": [float("nan")], "method": "hard"}, "all 1 candidates have NaN"),
    ],
)
def test_what_cannot_be_chosen_from_is_one_line(given, words):
    with pytest.raises(ValueError, match=words):
        slap_ds.select(**given)


class Last(slap_ds.Stateless):
    needs = frozenset()

    def __init__(self, spare=0):
        self.spare = spare

    def select(self, batch, budget, generator):
        end = len(batch) - self.spare
        return slap_ds.unweighted(torch.arange(end - budget, end))


def test_a_registered_selector_trains_with_its_settings(registered, tmp_path):
    slap_ds.register_selector("last", Last)
    own = {"method": "last", "keep": 0.5, "options": {"spare": 2}}
    config = tiny_config(
        tiny_model(tmp_path / "model"),
        tmp_path / "run",
        steps=2,
        selection=own,
        engine={"kind": "torch"},
    )
    assert slap_ds.train(config).steps == 2
    full = tiny_config(
        config.model.path,
        tmp_path / "full",
        steps=2,
        selection={"method": "full"},
        engine={"kind": "torch"},
    )
    slap_ds.train(full)
    for some, every in zip(picks(tmp_path / "run"), picks(tmp_path / "full"), strict=True):
        assert some == every[6:14]


def test_wrong_selectors_are_one_line(registered):
    with pytest.raises(ValueError, match="'slap' is that of a built-in method"):
        slap_ds.register_selector("slap", Last)
    slap_ds.register_selector("half", lambda: object())
    with pytest.raises(ValueError, match="object lacks needs, takes_quotas"):
        slap_ds.select([1.0], method="half")
    slap_ds.register_selector("last", Last)
    with pytest.raises(ValueError, match="unexpected keyword argument 'spares'"):
        slap_ds.select([1.0], method="last", spares=1)


def test_a_selector_of_another_package_works_by_its_name(registered, monkeypatch):
    def offered(value):
        found = EntryPoints([EntryPoint("last", value, selection.ENTRY_POINTS)])
        monkeypatch.setattr(selection, "entry_points", lambda group: found.select(group=group))

    offered("tests.api.test_functions:Last")
    assert slap_ds.select([1.0] * 4, keep=0.5, method="last", spare=1).picks.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"expected one of .*last"):
        slap_ds.select([1.0], method="first")
    offered("tests.api.test_functions:First")
    with pytest.raises(ValueError, match=r"functions:First.*cannot be imported"):
        slap_ds.select([1.0], method="last")


def test_an_installed_package_offers_its_selector_to_the_command_line(tmp_path):
    """By a distribution on the path, as pip would leave it."""
    (tmp_path / "lastly.py").write_text(
        "import slap_ds, torch\n"
        "class Last(slap_ds.Stateless):\n"
        "    needs = frozenset()\n"
        "    def select(self, batch, budget, generator):\n"
        "        return slap_ds.unweighted(torch.arange(len(batch))[-budget:])\n"
    )
    facts = tmp_path / "lastly-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: lastly\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[slap_ds.selectors]\nlast = lastly:Last\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import slap_ds;"
    code += "print(slap_ds.select([1.0] * 5, keep=0.4, method='last').picks.tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[3, 4]"


def test_a_callback_sees_every_record_and_may_end_the_run(tmp_path):
    path = tiny_model(tmp_path / "model")
    config = tiny_config(path, tmp_path / "run", steps=6, engine={"kind": "torch"})
    seen = []

    def until_third(record):
        seen.append(record)
        return record["event"] == "train" and record["step"] == 2

    first = slap_ds.train(config, callbacks=[until_third])
    # It is heard in the step after.
    assert (first.finished, first.steps) == (False, 4)
    second = slap_ds.train(config)
    assert (second.finished, second.steps) == (True, 6)
    whole = tiny_config(path, tmp_path / "whole", steps=6, engine={"kind": "torch"})
    result = slap_ds.train(whole.model_dump(mode="json"))
    assert result.eval_loss == second.eval_loss
    assert picks(tmp_path / "run") == picks(tmp_path / "whole")
    written = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert seen == written[: len(seen)]


def test_a_run_leaves_no_open_file(tmp_path):
    path = tiny_model(tmp_path / "model")
    config = tiny_config(path, tmp_path / "run", steps=1, engine={"kind": "torch"})
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    slap_ds.train(config)
    assert len(os.listdir("/proc/self/fd")) <= before
