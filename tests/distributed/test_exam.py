"""Answers during training on ranks: those of one process, and nothing is trained otherwise."""

from pathlib import Path

import pytest
import torch

from slap_ds.checkpoint.find import find
from slap_ds.engine.whole_state import whole_weights
from slap_ds.jsonl import read_lines
from slap_ds.train.loop import train
from slap_ds.train.run import prepare
from tests.ranks import run_ranks
from tests.recipes import losses, picks, tiny_config, tiny_model

pytestmark = pytest.mark.lane

LORA = {"lora": {"r": 4}}
# Batches of a few questions: two or three ranks do not have as many each.
ANSWERS = {"samples": 3, "max_new_tokens": 10, "batch_tokens": 160}
WAYS = {
    "llama": {},
    "glm": {},
    "mixtral": {},
    "llama with finer hooks": {"gradient_checkpointing": False},
    "llama zero2": {},
    "glm lora": LORA,
}


def config(folder: Path, name: str, way: str, answers: dict | None, **sections):
    kind = way.split()[0]
    path = folder / kind
    if not path.is_dir():
        tiny_model(path, kind)
    if "zero2" in way:
        sections.setdefault("engine", {"deepspeed": "configs/deepspeed/zero2.json"})
    return tiny_config(
        str(path),
        folder / name,
        steps=4,
        model={"gradient_checkpointing": True, **WAYS[way]},
        step={"balance": "none"},
        optimizer={"lr": 1e-2},
        evaluation={"max_samples": 4, "every": 2, "answers": answers},
        **sections,
    )


def train_and_draw(config) -> list[float]:
    """Random numbers that come next, after training."""
    torch.manual_seed(123)
    train(prepare(config))
    return torch.rand(3).tolist()


def records(run_dir: Path) -> list[dict]:
    return [r for r in read_lines(run_dir / "metrics.jsonl") if r["event"] == "eval"]


def marks(run_dir: Path) -> list[dict]:
    return [r["answers_by_task"] for r in records(run_dir)]


@pytest.mark.parametrize(
    "way",
    [w if w in ("llama", "glm lora") else pytest.param(w, marks=pytest.mark.slow) for w in WAYS],
)
def test_ranks_answer_as_one_process_and_train_as_without_answers(way, tmp_path):
    one = config(tmp_path, "one", way, ANSWERS, engine={"kind": "torch"})
    drawn = {"one": [train_and_draw(one)]}
    for name, world, answers in (("two", 2, ANSWERS), ("three", 3, ANSWERS), ("quiet", 2, None)):
        drawn[name] = run_ranks(train_and_draw, world, config(tmp_path, name, way, answers))
    expected = marks(tmp_path / "one")
    assert len(expected) == 3
    assert {task["count"] for found in expected for task in found.values()} == {3}
    assert len({str(found) for found in expected}) == 3
    for name in ("two", "three"):
        assert marks(tmp_path / name) == expected
    assert drawn["two"] == drawn["quiet"]
    assert picks(tmp_path / "two") == picks(tmp_path / "quiet")
    with_and_without = [read_lines(tmp_path / n / "metrics.jsonl") for n in ("two", "quiet")]
    assert losses(with_and_without[0]) == losses(with_and_without[1])
    evaluated = [[r["eval_loss"] for r in records(tmp_path / n)] for n in ("two", "quiet")]
    assert evaluated[0] == evaluated[1]
    weights = [whole_weights(find(tmp_path / n)[-1].folder) for n in ("two", "quiet")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_ranks_that_share_rows_answer_as_one_process(tmp_path):
    train_and_draw(config(tmp_path, "one", "llama", ANSWERS, engine={"kind": "torch"}))
    shared = config(tmp_path, "two", "llama", ANSWERS, engine={"sequence_parallel": 2})
    run_ranks(train_and_draw, 2, shared)
    assert marks(tmp_path / "two") == marks(tmp_path / "one")
