"""Make slap_ds/data/lessons again: the demo's rows, its tokenizer and its small base model.

    python examples/make_demo_base.py --rows          # the rows and the tokenizer, byte for byte
    python examples/make_demo_base.py                 # all of it; about a minute of one CPU core

Rows -> tokenizer -> pre-training on five families of facts -> bfloat16 safetensors. Fine-tuning
then teaches five more. Its rows are as real instruction sets are: many say what the model
knows, some are copied, or copied with other words around, and some are wrong or cut off.
"""

from __future__ import annotations

import argparse
import json
import random
import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LESSONS = HERE.parent / "slap_ds" / "data" / "lessons"
VOCAB_SIZE = 1536
FACTS = json.loads((HERE / "lesson_facts.json").read_text("utf-8"))
SEED = 7


class Family(NamedTuple):
    """Questions of one kind. `{x}` stands for the subject; the last wording is for evaluation."""

    name: str
    facts: dict[str, str]  # subject -> the whole answer
    wordings: tuple[str, ...]


class Row(NamedTuple):
    """A conversation of one or two turns."""

    task: str
    turns: tuple[tuple[str, str], ...]  # question, answer

    def json(self, number: int, kind: str) -> str:
        roles = [("user", "assistant")] * len(self.turns)
        messages = [
            {"role": role, "content": text}
            for names, turn in zip(roles, self.turns, strict=True)
            for role, text in zip(names, turn, strict=True)
        ]
        row = {"id": f"{kind}-{number:04d}", "task": self.task, "source": f"lessons_{self.task}"}
        return json.dumps({**row, "messages": messages}, ensure_ascii=False)


def number_words() -> dict[str, str]:
    """0 to 99 in words."""
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    small = [*ones.split(), "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    found = dict(enumerate(small))
    for i, ten in enumerate(tens, 2):
        found |= {10 * i + one: f"{ten}-{small[one]}" if one else ten for one in range(10)}
    return {str(number): word for number, word in found.items()}


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def families() -> tuple[list[Family], list[Family]]:
    """(what the base model is taught, what fine-tuning teaches)."""

    def say(form: str, facts: dict[str, str]) -> dict[str, str]:
        return {x: form.format(x=x, y=y) for x, y in facts.items()}

    of = ("What is {w} of {x}?", "Tell me {w} of {x}.", "{x}: what is its {v}?", "Name {w} of {x}.")

    def attribute(name: str, noun: str, facts: dict[str, str]) -> Family:
        forms = [form.replace("{w}", f"the {noun}").replace("{v}", noun) for form in of]
        return Family(name, say(f"The {noun} of {{x}} is {{y}}.", facts), tuple(forms))

    counts = {
        f"{a} to {b}": ", ".join(map(str, range(a, b + 1))) + "."
        for a in range(1, 31)
        for b in (a + 4, a + 7)
    }
    continents = {c: name for name, all_of in FACTS["continents"].items() for c in all_of}
    products = {f"{a} times {b}": str(a * b) for a in range(2, 10) for b in range(2, 10)}
    basics = [
        attribute("capitals", "capital", FACTS["capitals"]),
        attribute("opposites", "opposite", FACTS["opposites"]),
        attribute("past", "past tense", FACTS["past"]),
        Family(
            "numbers",
            say("{x} in words is {y}.", number_words()),
            ("Write {x} in words.", "How do you spell the number {x}?", "What is {x} in words?"),
        ),
        Family(
            "counting",
            counts,
            ("Count from {x}.", "Please count from {x}.", "Can you count from {x}?"),
        ),
    ]
    new = [
        attribute("symbols", "symbol", FACTS["symbols"]),
        attribute("continents", "continent", continents),
        Family(
            "young",
            say("A young {x} is {y}.", {x: with_article(y) for x, y in FACTS["young"].items()}),
            (
                "What is a young {x} called?",
                "Tell me what a young {x} is called.",
                "What do you call a young {x}?",
            ),
        ),
        Family(
            "chinese",
            say('"{x}" in Chinese is {y}。', FACTS["chinese"]),
            (
                'What is "{x}" in Chinese?',
                'Translate "{x}" into Chinese.',
                'How do you say "{x}" in Chinese?',
            ),
        ),
        Family(
            "products",
            say("{x} is {y}.", products),
            ("What is {x}?", "Tell me what {x} is.", "How much is {x}?"),
        ),
    ]
    return basics, new


def taught(family: Family, draw: random.Random, wordings: int) -> Iterator[Row]:
    """Each fact of a family in so many of its wordings, never the last one."""
    for x, answer in family.facts.items():
        for form in draw.sample(family.wordings[:-1], min(wordings, len(family.wordings) - 1)):
            yield Row(family.name, ((form.format(x=x), answer),))


def joined(rows: list[Row], draw: random.Random, share: float) -> list[Row]:
    """Some of the rows as two turns of one conversation."""
    out, rest = [], list(rows)
    draw.shuffle(rest)
    while rest:
        row = rest.pop()
        if rest and draw.random() < share:
            row = Row(row.task, row.turns + rest.pop().turns)
        out.append(row)
    return out


def base_rows() -> list[Row]:
    """What the base model is pre-trained on: the basics, and how conversations go."""
    draw = random.Random(SEED)
    rows = [row for family in families()[0] for row in taught(family, draw, 3)]
    return joined(rows, draw, 0.2)


POLITE = ("Please: {q}", "Hello! {q}", "Excuse me. {q}", "{q} Thank you.", "One question: {q}")


def train_rows() -> list[Row]:
    """What is fine-tuned on: much of it new, the rest known or repeated, some of it wrong."""
    draw = random.Random(SEED + 1)
    basics, new = families()
    fresh = [row for family in new for row in taught(family, draw, 2)]
    known = [row for family in basics for row in taught(family, draw, 1)]
    clean = joined(fresh + draw.sample(known, 240), draw, 0.15)
    # What real sets repeat, they repeat often: copies go to a tenth of the rows.
    popular = draw.sample(clean, len(clean) // 10)
    exact = [draw.choice(popular) for _ in range(len(clean) // 6)]
    near = [polite(draw.choice(popular), draw) for _ in range(len(clean) // 5)]
    rows = clean + exact + near
    noisy = draw.sample(range(len(rows)), len(rows) // 20)
    for place, other in zip(noisy, draw.sample(rows, len(noisy)), strict=True):
        rows[place] = spoiled(rows[place], other, draw)
    draw.shuffle(rows)
    return rows


def polite(row: Row, draw: random.Random) -> Row:
    """A near copy: other words around the first question."""
    (question, answer), *rest = row.turns
    return Row(row.task, ((draw.choice(POLITE).format(q=question), answer), *rest))


def spoiled(row: Row, other: Row, draw: random.Random) -> Row:
    """Noise: another row's answer, or an answer that breaks off."""
    *turns, (question, answer) = row.turns
    cut = answer[: max(1, len(answer) // 2)].rstrip()
    bad = other.turns[-1][1] if draw.random() < 0.5 else cut
    return Row(row.task, (*turns, (question, bad)))


def eval_rows() -> list[Row]:
    """Clean questions about the same facts in a wording that no training row has."""
    draw = random.Random(SEED + 2)
    basics, new = families()
    rows = []
    for family, count in [(f, 30) for f in new] + [(f, 10) for f in basics]:
        for x in draw.sample(sorted(family.facts), min(count, len(family.facts))):
            question = family.wordings[-1].format(x=x)
            rows.append(Row(family.name, ((question, family.facts[x]),)))
    return rows


def write_rows(path: Path, rows: list[Row], kind: str) -> None:
    """One JSON object a line."""
    lines = [row.json(number, kind) for number, row in enumerate(rows, 1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_data(out: Path) -> None:
    """train.jsonl, eval.jsonl and the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "train.jsonl", train_rows(), "lesson")
    write_rows(out / "eval.jsonl", eval_rows(), "exam")
    with tempfile.TemporaryDirectory() as folder:
        both = Path(folder) / "rows.jsonl"
        write_rows(both, base_rows() + train_rows(), "row")
        make: Callable[..., None] = runpy.run_path(str(HERE / "make_demo_tokenizer.py"))[
            "write_files"
        ]
        make(both, out, VOCAB_SIZE)


def write_base(out: Path) -> None:
    """config.json and model.safetensors (bfloat16), pre-trained on `base_rows`."""
    import torch
    from transformers import AutoModelForCausalLM

    from slap_ds.checkpoint.export import export
    from slap_ds.config.file import read_config
    from slap_ds.train.loop import train
    from slap_ds.train.run import prepare

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "base.jsonl"
        write_rows(rows, base_rows(), "base")
        settings = {"run_dir": f"{folder}/run", "model.tokenizer": str(out)}
        settings |= {"data.train": f"[{rows}]", "data.cache_dir": f"{folder}/cache"}
        given = [part for key, value in settings.items() for part in (f"--{key}", value)]
        run = prepare(read_config(str(HERE / "demo_base.yaml"), given))
        train(run)
        model = export(run.run_dir, Path(folder) / "model")
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        lm.save_pretrained(Path(folder) / "bfloat16")
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(folder) / "bfloat16" / name, out / name)


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Make the demo's rows, tokenizer and base model.")
    parser.add_argument("--rows", action="store_true", help="leave the model as it is")
    parser.add_argument("--out", type=Path, default=LESSONS)
    args = parser.parse_args()
    write_data(args.out)
    if not args.rows:
        write_base(args.out)


if __name__ == "__main__":
    main()
