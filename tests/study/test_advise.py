"""The pilot names what was planted: near-copies, wrong answers, several passes, one large source.

The rows are the facts of the demo's lessons, each once, worded at random; the model is the small
base that ships in the package, which knows some of them.
"""

import json
import random
import runpy
from pathlib import Path

import pytest

from slap_ds.config.file import read_config, write_config
from slap_ds.data.formats import Conversation, Message
from slap_ds.engine import start_ranks
from slap_ds.study.advise import Question, advise, findings
from slap_ds.study.data import changed
from slap_ds.study.plan import Duplicates, Noise, Variant

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
