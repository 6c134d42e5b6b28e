"""Every method end to end: one rank and two pick alike, stopped and resumed, reused or not."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from slap_ds.checkpoint.state import packed, unpacked
from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.selection import SELECTORS
from slap_ds.train.inputs import make_parts, read_inputs
from slap_ds.train.record import train_step
from slap_ds.train.run import prepare
from tests.ranks import run_ranks
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model

WORDS = [
    "red",
    "green",
    "blue",
    "seven",
    "eight",
    "nine",
    "river",
    "stone",
    "cloud",
    "maple",
    "otter",
    "lamp",
]


def write_rows(path: Path, count: int, shift: int) -> str:
    """Conversations of different lengths, no two alike."""
    with path.open("w") as file:
        for i in range(count):
            answer = " ".join(WORDS[(i * k + shift + k) % 12] for k in range(3 + i % 9))
            turns = [("user", f"{WORDS[i % 12]} {i + shift}?"), ("assistant", answer)]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
            file.write("\n")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two steps an epoch, four epochs."""
    folder = tmp_path_factory.mktemp("baselines")
    raw = tiny_config(
        tiny_model(folder / "model"),
        folder / "run",
        data={"train": [write_rows(folder / "train.jsonl", 24, 0)], "eval": []},
        batch={"candidates": 12},
        steps=8,
        selection={
            "keep": 0.75,
            "validation": [write_rows(folder / "validation.jsonl", 5, 100)],
            "reference_losses": str(folder / "losses.jsonl"),
            "greats": {"batch": 3},
            "selective_backprop": {"schedule": "published", "start": 0.1},
        },
    )
    ids = read_inputs(raw).train.sample_ids.tolist()
    rows = [{"id": key, "loss": 7 + (i * 5 % 11) / 40} for i, key in enumerate(ids)]
    (folder / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return raw


def changed(config: Config, name: str, **sections) -> Config:
    raw = config.model_dump(mode="json", by_alias=True)
    raw["run_dir"] = f"{config.run_dir}-{name}"
    for section, fields in sections.items():
        raw[section] = raw[section] | fields
    return Config.model_validate(raw)


def through_files(state, run_dir: Path):
    """The state as a checkpoint's files give it back."""
    with tempfile.TemporaryDirectory(dir=run_dir.parent) as folder:
        for name, data in packed(state).items():
            (Path(folder) / name).write_bytes(data)
        return unpacked(Path(folder))


def every_method(config: Config, stop: bool, steps: int = 3) -> dict[str, list]:
    """Some steps of each method, one after the other on the same weights.

    With `stop` stream, scorer and selector begin anew in the middle, from what was saved of them.
    """
    run = prepare(config)
    found: dict[str, list] = {}
    for method in sorted(SELECTORS):
        run.config = changed(config, "", selection={"method": method})
        run.stream, run.scorer, run.selector = make_parts(run.config, run.inputs.train)
        found[method] = []
        for step in range(steps):
            if stop and step == 2:
                parts = (run.stream, run.scorer, run.selector)
                saved = [through_files(part.state_dict(), Path(config.run_dir)) for part in parts]
                run.stream, run.scorer, run.selector = make_parts(run.config, run.inputs.train)
                for part, state in zip((run.stream, run.scorer, run.selector), saved, strict=True):
                    part.load_state_dict(state)
            batch = CandidateBatch(run.inputs.train, next(run.stream))
            record = train_step(run, step, batch)
            selection, metrics = record.selection, record.metrics
            found[method].append(
                (selection.picks.tolist(), selection.weights.tolist(), metrics["loss"], metrics)
            )
    return found


def dealt_and_under_quotas(dealt: Config, quota: Config) -> tuple[dict[str, list], dict[str, list]]:
    return every_method(dealt, True), every_method(quota, False, steps=1)


def test_every_method_on_one_rank_and_two_stopped_or_not_reused_or_not(base):
    torch_engine = {"kind": "torch"}
    whole = every_method(changed(base, "torch", engine=torch_engine), False)
    reuse = {"model": {"gradient_checkpointing": True}, "step": {"forward": "reuse"}}
    quota = {**reuse, "step": {"forward": "reuse", "balance": "quota", "quota_slack": 0.0}}
    two = run_ranks(dealt_and_under_quotas, 2, changed(base, "2"), changed(base, "quota", **quota))
    ways = {
        "reuse": every_method(changed(base, "reuse", engine=torch_engine, **reuse), True),
        "2 ranks": two[0][0],
    }
    for method, steps in whole.items():
        for step, (chosen, weights, loss, record) in enumerate(steps):
            for way, found in ways.items():
                told = f"{method}, step {step}, {way}"
                assert found[method][step][0] == chosen, told
                assert found[method][step][1] == pytest.approx(weights), told
                assert abs(found[method][step][2] - loss) < 1e-5, told
            forward = ways["reuse"][method][step][3]["forward"]
            assert (forward == "reuse") == (record["forward"] == "separate")
        counts = [len(step[0]) for step in steps]
        if method == "infobatch":  # an epoch of everything, scored; then its own count
            assert counts[:2] == [12, 12]
            assert [step[3]["forward"] for step in steps] == ["separate"] * 3
            assert any(w > 1 for step in steps[2:] for w in step[1])
        elif method == "selective_backprop":
            assert counts == [12, 12, 9]
        else:
            assert counts == [12 if method == "full" else 9] * 3, method
    for method, steps in two[0][1].items():  # the budget is met where picks may not move
        chosen, weights, _, record = steps[0]
        assert two[1][1][method][0][:2] == (chosen, weights)
        assert record["forward"] == whole[method][0][3]["forward"].replace("separate", "reuse")
        assert len(set(chosen)) == len(whole[method][0][0]), method
    extra = whole["greats"][0][3]["scoring_flops"] / whole["grand"][0][3]["scoring_flops"]
    assert extra > 1.1  # the validation samples' forward is counted


@pytest.mark.parametrize("method", ["infobatch", "uds"])
def test_a_run_that_was_stopped_ends_the_same(method, base):
    found = {}
    for name in ("whole", "broken"):
        config = changed(
            base, f"{method}-{name}", engine={"kind": "torch"},
            selection={"method": method}, checkpoint={"every": 3, "keep_last": 9},
        )  # fmt: skip
        metrics = run_config(config)
        if name == "broken":
            for later in Path(config.run_dir, "checkpoints").glob("step-*"):
                if int(later.name.removeprefix("step-")) > 3:
                    shutil.rmtree(later)
            metrics = run_config(config)
        found[name] = losses(metrics), picks(Path(config.run_dir))
    assert found["broken"] == found["whole"]
