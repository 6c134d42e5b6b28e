"""The pilot names what was planted: near-copies, wrong answers, several passes, one large source.

The rows are the facts of the demo's lessons, each once, worded at random; the model is the small
base that ships in the package, which knows some of them.
"""

import json
import math
import random
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from slap_ds.cli import main
from slap_ds.config.file import read_config, write_config
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.formats import Conversation, Message
from slap_ds.data.store import Sample
from slap_ds.engine import start_ranks
from slap_ds.selection import ScoredBatch
from slap_ds.selection.methods.sampled import Sampled
from slap_ds.study.advise import Question, advise, measure
from slap_ds.study.data import changed
from slap_ds.study.findings import findings
from slap_ds.study.pilot import (
    Overlaps,
    Work,
    exchanged,
    in_common,
    likeness,
    longest_answer,
    ranks,
    size_gain,
    token_weights,
    wrong_answers,
)
from slap_ds.study.plan import Duplicates, Noise, Variant
from slap_ds.train.record import train_step
from slap_ds.train.run import prepare
from slap_ds.train.score_pass import rows_pass, sum_pass
from tests.recipes import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
LESSONS = ROOT / "slap_ds" / "data" / "lessons"
NEAR = Variant(duplicates=Duplicates(times=3, edited=0.1))
WRONG = Variant(noise=Noise(share=0.25))
PLANTED = ("fresh", "duplicates", "noise", "epochs", "dominated")


@pytest.fixture(scope="module")
def facts():
    """Conversations by family, each fact once, and as many of others held out."""
    families = runpy.run_path(str(ROOT / "examples" / "make_demo_base.py"))["families"]()
    rows = {"train": {}, "eval": {}}
    draw = random.Random(5)
    for family in [*families[0], *families[1]]:
        subjects = sorted(family.facts)
        draw.shuffle(subjects)
        for i, x in enumerate(subjects):
            question = draw.choice(family.wordings).format(x=x)
            messages = (Message("user", question), Message("assistant", family.facts[x]))
            row = Conversation(messages, family.name, family.name, "en")
            rows["eval" if i % 3 == 0 else "train"].setdefault(family.name, []).append(row)
    return rows


def write(path, rows):
    lines = []
    for row in rows:
        messages = [{"role": m.role, "content": m.content} for m in row.messages]
        # A variant names its rows after itself; real data have no such label.
        source = row.source.split(" (")[0]
        lines.append(json.dumps({"messages": messages, "source": source}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def planted(kind, seed, facts, folder):
    """A run's config with data of this kind."""
    draw = random.Random(seed)
    few = {"dominated": 4}
    rows = []
    for name, members in facts["train"].items():
        members = draw.sample(members, len(members))
        rows += members if name == "numbers" else members[: few.get(kind)]
    if kind == "duplicates":
        rows = changed(rows, NEAR, seed)
    if kind == "noise":
        rows = changed(rows, WRONG, seed)
    held_out = [row for members in facts["eval"].values() for row in members]
    train = write(folder / f"{kind}-{seed}.jsonl", rows)
    held = write(folder / "eval.jsonl", held_out)
    passes = 3 if kind == "epochs" else 1
    given = {"run_dir": folder / "run", "seed": seed, "epochs": passes, "steps": "null"}
    given |= {"data.train": f"[{train}]", "data.eval": f"[{held}]", "engine.kind": "torch"}
    given |= {"model.path": LESSONS, "batch.candidates": 16}
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    return read_config(str(ROOT / "configs" / "demo.yaml"), flags)


def test_planted_regimes_are_named(facts, tmp_path):
    right, told = 0, []
    for seed in (1, 2):
        for kind in PLANTED:
            config = planted(kind, seed, facts, tmp_path)
            found = advise(config, Question(), start_ranks(config))
            named = {f.regime for f in findings(found) if f.regime}
            right += named == {kind}
            told.append((kind, seed, named, found["copies"], found["wrong"], found["source"]))
    assert right >= 9, told


def sample(prompt, answer):
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt))


def random_rows(generator, count=12):
    return [
        sample(generator.integers(0, 6, 9), generator.integers(0, 6, generator.integers(1, 6)))
        for _ in range(count)
    ]


def test_overlaps_against_sets():
    rows = random_rows(np.random.default_rng(0))
    sets = []
    for row in rows:
        ids, mask = row.ids.tolist(), row.mask.tolist()
        sets.append({(a, b, m) for a, b, m in zip(ids, ids[1:], mask[1:], strict=False)})
    held_by = Counter(pair for each in sets for pair in each)

    def weight(pairs):
        return sum(math.log(len(rows) / held_by[pair]) for pair in pairs)

    def jaccard(a, b):
        return weight(a & b) / weight(a | b) if weight(a | b) > 1e-9 else 1.0

    overlaps = Overlaps(rows)
    for i, a in enumerate(sets):
        expected = []
        for b in sets:
            answers = ({pair for pair in each if pair[2]} for each in (a, b))
            expected.append(min(jaccard(a, b), jaccard(*answers)))
        np.testing.assert_allclose(overlaps.of(i), expected, atol=1e-12)


def test_the_same_long_prompt_with_another_answer_is_no_copy():
    prompt = list(range(100, 160))
    rows = [sample(prompt, [1, 2, 3]), sample(prompt, [4, 5, 6]), sample(prompt, [1, 2, 3])]
    rows += random_rows(np.random.default_rng(1))
    found = Overlaps(rows).of(0)
    assert found[2] == pytest.approx(1)
    assert found[1] < 0.2


def test_exchanged_puts_the_longest_answer_behind_every_prompt():
    mask = np.array([0, 0, 1, 0, 0, 1, 1, 0, 1, 1], dtype=bool)
    assert longest_answer(mask) == (5, 7)
    own = Sample(np.arange(10, dtype=np.int32), mask)
    other = sample([50, 51, 52, 53, 54, 55], [60])
    found = exchanged(own, [other], 20)
    assert [s.ids.tolist() for s in found] == [
        [0, 1, 2, 3, 4, 5, 6],
        [50, 51, 52, 53, 54, 55, 5, 6],
    ]
    assert [s.ids[s.mask].tolist() for s in found] == [[5, 6]] * 2
    short = exchanged(own, [other], 5)  # prompts lose their beginning
    assert [s.ids.tolist() for s in short] == [[2, 3, 4, 5, 6], [53, 54, 55, 5, 6]]


def test_tokens_in_common_weigh_their_rarity():
    rows = [sample([1, 2], [2, 3]), sample([1, 4], [3]), sample([1], [1]), sample([1, 5], [6])]
    weights = token_weights(rows, 8)
    assert weights[[1, 2, 3, 7]] == pytest.approx([0, math.log(4), math.log(2), 0])
    assert in_common(rows[0], weights) == pytest.approx(math.log(4))
    assert in_common(rows[2], weights) == 0
    # {1, 2} and {1, 4}: 1 is in all rows, 2 and 4 in one each; {1} and {1} say nothing.
    assert likeness(rows[0], rows[1], weights) == 0
    assert likeness(rows[0], sample([1, 2, 4], [3]), weights) == pytest.approx(0.5)
    assert likeness(rows[2], rows[2], weights) == 1


def test_shares_of_wrong_answers_from_a_simulation():
    generator = np.random.default_rng(3)

    def drawn(count, wrong, blind):
        """Ranks where the own prompt is as good as any other for a share of the answers."""
        misfit = generator.normal(size=(count, 5))
        right = generator.random(count) >= wrong
        misfit[right & (generator.random(count) >= blind), 0] -= 20
        return ranks(misfit)

    shares, bounds = [], []
    for _ in range(200):
        found = {"a": drawn(150, 0.25, 0.2), "b": drawn(50, 0.25, 0.4), "hazy": drawn(50, 0.25, 1)}
        held = {"a": drawn(150, 0, 0.2), "b": drawn(50, 0, 0.4), "hazy": drawn(50, 0, 1)}
        wrong = wrong_answers(4, found, held, 0.6)
        shares.append((wrong.share, wrong.error))
        bounds.append((wrong.at_most, wrong.told))
    share, error = np.array(shares).T
    assert share.mean() == pytest.approx(0.25, abs=0.02)
    assert error.mean() == pytest.approx(share.std(), rel=0.3)
    # 0.25 and of the rest what cannot be told, over the three sources.
    at_most, told = np.array(bounds).T.mean(1)
    assert at_most == pytest.approx((150 * 0.4 + 50 * 0.55 + 50) / 250, abs=0.02)
    assert told == pytest.approx(0.8, abs=0.02)


def test_nothing_is_told_without_held_out_rows():
    wrong = wrong_answers(4, {"a": np.array([0.0, 1.0, 0.5, 0.25])}, {}, 0.6)
    assert (wrong.told, wrong.share) == (0, 0)
    assert wrong.at_most == pytest.approx(0.5 / 0.6)


def test_size_gain_against_draws():
    generator = np.random.default_rng(4)
    n, cost = generator.integers(1, 60, 40), generator.integers(60, 200, 40)
    batch = ScoredBatch(
        torch.zeros(40), tokens=torch.from_numpy(cost), response_tokens=torch.from_numpy(n)
    )
    chance = Sampled(0.5).chances(batch).numpy()

    def variance(p):
        picked = generator.random((20_000, 40)) < p
        return float(((picked / p - 1) ** 2 * n).sum(1).mean())

    expected = variance(chance) / variance(np.full(40, 0.5))
    assert size_gain(n, cost, 0.5, 0.1) == pytest.approx(expected, rel=0.02)
    assert expected < 1


@pytest.mark.parametrize("checkpointing", [True, False])
def test_costs_are_those_of_the_trainer(tmp_path, checkpointing):
    sections = {"model": {"gradient_checkpointing": checkpointing}, "engine": {"kind": "torch"}}
    sections |= {"batch": {"candidates": 40}, "selection": {"method": "full", "keep": 0.975}}
    config = tiny_config(tiny_model(tmp_path / "model"), tmp_path / "run", **sections)
    run = prepare(config)
    rows = measure(run, config, Question(rows=40))["costs"]
    # The same rows as one candidate batch.
    generator = np.random.Generator(np.random.Philox(key=[config.seed, len(run.inputs.train)]))
    drawn = generator.permutation(len(run.inputs.train))[:40]
    batch = CandidateBatch(run.inputs.train, drawn)
    scoring = config.selection.model_copy(update={"method": "hard"})
    path = {"selection": scoring, "run_dir": str(tmp_path / "hard")}
    hard = train_step(prepare(config.model_copy(update=path)), 0, batch).metrics
    full, sampled, scored = (row["flops"] for row in rows)
    assert hard["picked"] == 39
    assert hard["forward"] == ("reuse" if checkpointing else "separate")
    assert full == pytest.approx(hard["full_flops"])
    assert sampled == pytest.approx(0.975 * full)
    # The one that is left out is not of mean length; a forward more or less would be a quarter.
    assert scored == pytest.approx(hard["flops"], rel=0.03)
    nats, tokens = rows_pass(run.engine, run.comm, [run.inputs.train[int(i)] for i in drawn], 512)
    again_nats, again_tokens = sum_pass(run.engine, run.comm, run.inputs.train, drawn, 512)
    np.testing.assert_allclose(nats, again_nats, rtol=1e-5)
    np.testing.assert_array_equal(tokens, again_tokens)


def test_units_without_a_head_are_those_of_the_method():
    for work, units in ((Work(8, 0, 4, 3, True), 0.7), (Work(8, 0, 3, 3, False), 2.8 / 3)):
        found = [row["units"] for row in work.rows(0.6)]
        assert found == pytest.approx([1, 0.6, units])


def test_command_prints_and_writes(facts, tmp_path, capsys):
    config = planted("noise", 1, facts, tmp_path)
    write_config(config, tmp_path / "run.yaml")
    out = tmp_path / "advice.json"
    main(["advise", str(tmp_path / "run.yaml"), "--json", str(out), "--epochs", "3"])
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert {f["regime"] for f in found["findings"]} == {"noise", "epochs"}
    assert "rows whose answers fit worst" in printed
    assert found["suspects"][0] in " ".join(printed.split())
    assert found["passes"] == pytest.approx(3, rel=0.05)
    assert not Path(config.run_dir).exists()  # nor the pilot's own folder
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".advise")]


def test_what_cannot_be_told_is_said(facts, tmp_path):
    config = planted("noise", 1, facts, tmp_path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": []})})
    named = findings(advise(config, Question(rows=64), start_ranks(config)))
    assert [f.regime for f in named] == ["", "fresh"]
    assert "data.eval" in named[0].do


def test_mistakes_are_told(facts, tmp_path):
    with pytest.raises(ValueError, match="32 rows"):
        Question(rows=8)
    config = planted("fresh", 1, facts, tmp_path)
    few = write(tmp_path / "few.jsonl", facts["train"]["numbers"][:20])
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": [few]})})
    with pytest.raises(ValueError, match="have 20 rows"):
        advise(config, Question(), start_ranks(config))
