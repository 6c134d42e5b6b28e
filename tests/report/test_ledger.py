"""The ledger against picks.jsonl and the data file, and a chain that no change survives."""

import json
import math

import pytest

import slap_ds
from slap_ds.cli import main
from slap_ds.data.sources import BUILTIN
from slap_ds.jsonl import read_lines
from slap_ds.report.ledger import Ledger
from tests.recipes import tiny_config, tiny_model

STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without a stop, and the same one stopped in its fourth step and continued."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_model(folder / "model")

    def config(name):
        return tiny_config(model, folder / name, steps=STEPS, engine={"kind": "torch"})

    slap_ds.train(config("whole"))
    stopped = config("stopped")
    first = slap_ds.train(stopped, callbacks=[lambda r: r["event"] == "train" and r["step"] == 2])
    assert not first.finished
    slap_ds.train(stopped)
    return folder


def lines(run_dir):
    return (run_dir / "picks.jsonl").read_text("utf-8").splitlines()


def test_it_says_when_each_sample_was_trained_and_when_not(runs):
    ledger = Ledger(runs / "whole")
    expected = {}
    for record in read_lines(runs / "whole" / "picks.jsonl"):
        for i, *rest in zip(record["ids"], record["weights"], record["losses"], strict=True):
            expected.setdefault(i, []).append((record["step"], *rest))
    assert {e.id: e.trained for e in ledger.entries if e.trained} == expected
    drawn = sum(len(e.trained) + len(e.dropped) for e in ledger.entries)
    assert drawn == STEPS * ledger.config.batch.candidates
    assert all(not {step for step, *_ in e.trained} & set(e.dropped) for e in ledger.entries)


def test_losses_are_those_that_were_scored(runs):
    train = [r for r in read_lines(runs / "whole" / "metrics.jsonl") if r["event"] == "train"]
    picks = read_lines(runs / "whole" / "picks.jsonl")
    for metrics, record in zip(train, picks, strict=True):
        mean = math.fsum(record["losses"]) / len(record["losses"])
        assert mean == pytest.approx(metrics["picked_loss"], rel=1e-6)


def test_a_sample_is_found_by_id_and_by_its_row(runs):
    ledger = Ledger(runs / "whole")
    rows = [json.loads(line) for line in BUILTIN["builtin:demo/train"].open(encoding="utf-8")]
    for entry in ledger.entries[::7]:
        said = [message.content for message in ledger.conversation(entry).messages]
        assert said == [message["content"] for message in rows[entry.line - 1]["messages"]]
        assert ledger.find(str(entry.id)) is entry
        assert ledger.find(f"{entry.file}:{entry.line}") is entry
    for name in ("12", "rain:1", f"nowhere.jsonl:{entry.line}", f"{entry.file}:0"):
        with pytest.raises(ValueError, match=r"0 samples are .* expected one"):
            ledger.find(name)


def test_the_chain_is_the_same_with_and_without_a_stop(runs):
    assert lines(runs / "whole") == lines(runs / "stopped")
    assert len(Ledger(runs / "whole").last_link) == 64


def changed_weight(kept):
    record = json.loads(kept[3])
    return [*kept[:3], json.dumps({**record, "weights": [9.0, *record["weights"][1:]]}), *kept[4:]]


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (changed_weight, 3),
        (lambda kept: [*kept[:2], *kept[3:]], 3),
        (lambda kept: kept[1:], 1),
        (lambda kept: [kept[1], kept[0], *kept[2:]], 1),
        (lambda kept: [*kept[:2], kept[2].rpartition(', "chain"')[0] + "}", *kept[3:]], 2),
    ],
)
def test_a_changed_file_is_refused_by_the_step_of_the_change(runs, change, step, tmp_path):
    for name in ("config.yaml", "picks.jsonl"):
        (tmp_path / name).write_text((runs / "whole" / name).read_text("utf-8"), "utf-8")
    Ledger(tmp_path)
    (tmp_path / "picks.jsonl").write_text("\n".join(change(lines(tmp_path))) + "\n", "utf-8")
    with pytest.raises(ValueError, match=f"the line of step {step} does not follow"):
        Ledger(tmp_path)


def test_the_command(runs, tmp_path, capsys):
    main(["ledger", str(runs / "whole"), "--export", str(tmp_path / "all.jsonl")])
    told = capsys.readouterr().out
    assert f"the chain holds over {STEPS} steps; its last hash is " in told
    rows = read_lines(tmp_path / "all.jsonl")
    best = max(rows, key=lambda row: len(row["trained"]))
    main(["ledger", str(runs / "whole"), "--sample", str(best["id"])])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"sample {best['id']}: {best['file']}, line {best['line']}"
    first = best["trained"][0]
    assert f"  step {first['step']}: weight {first['weight']:.4g}, loss {first['loss']:.4f}" in told
