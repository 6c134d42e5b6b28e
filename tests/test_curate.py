"""`slap-ds curate`: the rows a run would keep, exactly as they were, with their scores."""

import datetime
import gzip
import json
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from slap_ds import curate as curate_module
from slap_ds.cli import main
from slap_ds.curate import curate
from slap_ds.data.reread import reread
from slap_ds.data.samples import Rules
from slap_ds.data.sources import Limits
from slap_ds.data.stream import CandidateStream
from slap_ds.data.templates import make_template
from slap_ds.distributed import startup as start
from slap_ds.distributed.comm import Comm
from slap_ds.engine import start_ranks
from slap_ds.engine.process_group import limit_waiting
from slap_ds.errors import OtherRankFailed, RankError
from slap_ds.jsonl import read_lines
from slap_ds.train.inputs import read_inputs
from tests.evaluation.test_eval_loss import plain_turns
from tests.ranks import run_ranks
from tests.recipes import SIZES, picks, run_config, tiny_config, tiny_model

DEMO = Path(__file__).parents[1] / "slap_ds" / "data" / "demo" / "train.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("curate"))


@pytest.fixture
def data(tmp_path):
    """A hundred demo rows, with a row in between that cannot be used."""
    lines = DEMO.read_text("utf-8").split("\n")[:100]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines[:7], '{"messages": []}', *lines[7:]]) + "\n", "utf-8")
    return path


def make(model, folder, data, **sections):
    config = tiny_config(
        model,
        folder / "run",
        **{
            "engine": {"kind": "torch"},
            "data": {"train": [str(data)], "eval": []},
            "batch": {"candidates": 30},
            **sections,
        },
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config, str(path)


def rows_of(path: Path) -> list[dict]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def originals(data: Path) -> dict[str, dict]:
    return {row["id"]: row for row in rows_of(data) if row["messages"]}


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("slap-ds: error") == 1
    return error


def plain_losses(config, store):
    turns = plain_turns(config, store)
    nats = np.bincount([t[0] for t in turns], [t[2] for t in turns])
    return nats / np.bincount([t[0] for t in turns], [t[3] for t in turns])


def test_the_hardest_of_each_batch_by_a_plain_forward(model, tmp_path, data, capsys):
    config, path = make(model, tmp_path, data, selection={"method": "hard"})
    out = tmp_path / "sub" / "kept.jsonl"
    rest = tmp_path / "sub" / "dropped.jsonl.gz"
    main(["curate", path, "--out", str(out), "--keep", "0.4", "--dropped", str(rest)])
    assert not (tmp_path / "run").exists()
    store = read_inputs(config).train
    losses = plain_losses(config, store)
    expected = []
    for batch in CandidateStream(len(store), 30, config.seed, epochs=1):
        budget = round(0.4 * len(batch))
        expected += batch[np.argsort(-losses[batch], kind="stable")[:budget]].tolist()
    found = rows_of(out)
    assert [row["slap"]["sample_id"] for row in found] == store.sample_ids[
        sorted(expected)
    ].tolist()
    np.testing.assert_allclose([r["slap"]["loss"] for r in found], losses[sorted(expected)], 1e-5)
    assert {row["slap"]["picked"] for row in found} == {1}
    assert all("stratum" not in row["slap"] for row in found)
    assert f"wrote {len(found)} of 100 samples" in capsys.readouterr().out
    others = [i for i in range(100) if i not in expected]
    dropped = rows_of(rest)
    assert [r["slap"]["sample_id"] for r in dropped] == store.sample_ids[others].tolist()
    np.testing.assert_allclose([r["slap"]["loss"] for r in dropped], losses[others], 1e-5)
    assert {(r["slap"]["picked"], r["slap"]["weight"]) for r in dropped} == {(0, None)}
    rows = originals(data)
    for row in found + dropped:
        del row["slap"]
        assert row == rows[row["id"]]
    assert sorted(p.name for p in out.parent.iterdir()) == ["dropped.jsonl.gz", "kept.jsonl"]


def test_slap_keeps_what_a_run_picks_in_its_first_step(model, tmp_path, data):
    config, path = make(model, tmp_path, data, selection={"method": "slap", "slap": {"strata": 3}})
    main(["curate", path, "--out", str(tmp_path / "kept.jsonl.gz")])
    found = {row["slap"]["sample_id"]: row["slap"] for row in rows_of(tmp_path / "kept.jsonl.gz")}
    main(["train", path, "--steps", "1"])
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert set(picks(tmp_path / "run")[0]) <= set(found)
    assert len(found) == 3 * 18 + 6
    batch = next(CandidateStream(100, 30, config.seed, epochs=1))
    ids = set(read_inputs(config).train.sample_ids[batch].tolist())
    kept = [slap for sample_id, slap in found.items() if sample_id in ids]
    assert {slap["sample_id"] for slap in kept} == set(picks(tmp_path / "run")[0])
    strata = Counter(slap["stratum"] for slap in kept)
    assert [strata[k] for k in range(3)] == first["strata_budgets"]


def test_what_a_run_has_picked(model, tmp_path, data, capsys):
    _, path = make(model, tmp_path, data, steps=8)
    main(["train", path])
    times = Counter(i for step in picks(tmp_path / "run") for i in step)
    assert len(set(times.values())) > 1
    out = tmp_path / "kept.jsonl"
    main(["curate", path, "--out", str(out), "--run", str(tmp_path / "run")])
    found = rows_of(out)
    assert {row["slap"]["sample_id"]: row["slap"]["picked"] for row in found} == dict(times)
    assert {row["slap"]["weight"] for row in found} == {1.0}
    rows = originals(data)
    assert all(rows[row["id"]]["messages"] == row["messages"] for row in found)

    rest = tmp_path / "rest.jsonl"
    of_run = ["--out", str(out), "--run", str(tmp_path / "run"), "--dropped", str(rest)]
    main(["curate", path, *of_run])
    never = [row["slap"] for row in rows_of(rest)]
    assert len(never) == 100 - len(times)
    assert {(slap["picked"], slap["weight"]) for slap in never} == {(0, None)}
    main(["curate", path, *of_run, "--keep", "0.3"])
    assert len(rows_of(rest)) == 70
    most = [row["slap"]["picked"] for row in rows_of(out)]
    assert sorted(most, reverse=True) == sorted(times.values(), reverse=True)[:30]

    data.write_text(data.read_text("utf-8").replace("?", "!"), "utf-8")
    error = fails(capsys, "curate", path, "--out", out, "--run", tmp_path / "run")
    assert "do not hold" in error
    assert len(rows_of(out)) == 30


@pytest.mark.parametrize("method", ["random", "full"])
def test_methods_that_look_at_no_scores_still_report_losses(method, model, tmp_path, data):
    config, path = make(model, tmp_path, data, selection={"method": method, "keep": 0.5})
    out = tmp_path / "kept.jsonl"
    main(["curate", path, "--out", str(out)])
    found = rows_of(out)
    assert len(found) == (50 if method == "random" else 100)
    losses = plain_losses(config, read_inputs(config).train)
    positions = [row["slap"]["sample_id"] & (2**28 - 1) for row in found]
    np.testing.assert_allclose([r["slap"]["loss"] for r in found], losses[positions], 1e-5)


def test_the_file_is_training_data_again(model, tmp_path, data):
    config, path = make(model, tmp_path, data)
    out = tmp_path / "kept.jsonl"
    main(["curate", path, "--out", str(out)])
    first = out.read_bytes()
    config, again = make(model, tmp_path, out)
    store = read_inputs(config).train
    assert len(store) == len(rows_of(out)) == 60
    assert [r["slap"]["sample_id"] >> 28 for r in rows_of(out)] == (store.sample_ids >> 28).tolist()
    main(["curate", again, "--out", str(tmp_path / "smaller.jsonl"), "--keep", "0.5"])
    assert len(rows_of(tmp_path / "smaller.jsonl")) == 30
    assert out.read_bytes() == first


@pytest.mark.parametrize("change", ["another text", "a row less", "a row more"])
def test_sources_that_change_meanwhile_are_noticed(change, model, tmp_path, data):
    config, _ = make(model, tmp_path, data)
    inputs = read_inputs(config)
    rules = Rules("auto", make_template("auto", inputs.tokenizer), 256, "truncate", Limits())
    rows = reread(inputs.train, [str(data)], rules)
    assert [origin.position for origin in rows] == list(range(100))
    lines = data.read_text("utf-8").split("\n")[:-1]
    if change == "another text":
        lines[40] = lines[41]
    elif change == "a row less":
        lines.pop()
    else:
        lines.append(lines[0])
    data.write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(ValueError, match="changed"):
        list(reread(inputs.train, [str(data)], rules))


def test_parquet_rows_keep_their_fields(model, tmp_path):
    rows = [
        {"prompt": f"{n} + 1 =", "completion": str(n + 1), "n": n, "tags": ["a", None]}
        for n in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    _, path = make(model, tmp_path, tmp_path / "rows.parquet", batch={"candidates": 12})
    main(["curate", path, "--out", str(tmp_path / "kept.jsonl"), "--keep", "0.5"])
    found = rows_of(tmp_path / "kept.jsonl")
    assert len(found) == 6
    for row in found:
        del row["slap"]
        assert row in rows


def test_tables_keep_what_json_has_no_form_for(model, tmp_path):
    when = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)
    odd = {
        "at": when,
        "day": when.date(),
        "hour": datetime.time(8, 15),
        "took": datetime.timedelta(hours=25),
        "image": {"bytes": b"\x00\xff", "path": None},
        "price": Decimal("1.50"),
        "scores": [0.5, float("nan"), float("inf")],
        "labels": [("a", 1)],
    }
    rows = [{"prompt": f"{n} + 1 =", "completion": str(n + 1), **odd} for n in range(6)]
    types = {name: pa.array([value]).type for name, value in odd.items() if name != "labels"}
    types["labels"] = pa.map_(pa.string(), pa.int64())
    schema = pa.schema({"prompt": pa.string(), "completion": pa.string(), **types})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    _, path = make(model, tmp_path, tmp_path / "rows.parquet", batch={"candidates": 6})
    main(["curate", path, "--out", str(tmp_path / "kept.jsonl"), "--keep", "0.5"])
    for row in rows_of(tmp_path / "kept.jsonl"):
        assert {name: row[name] for name in odd} == {
            "at": "2024-02-29T12:30:00+00:00",
            "day": "2024-02-29",
            "hour": "08:15:00",
            "took": "1 day, 1:00:00",
            "image": {"bytes": "AP8=", "path": None},
            "price": "1.50",
            "scores": [0.5, None, None],
            "labels": [["a", 1]],
        }


def test_rows_that_the_configs_own_limits_let_through(model, tmp_path, data):
    deep = json.loads("[" * 80 + "]" * 80)
    lines = data.read_text("utf-8").split("\n")
    data.write_text("\n".join([json.dumps({**json.loads(lines[0]), "x": deep}), *lines[1:]]))
    _, path = make(model, tmp_path, data, selection={"method": "full"})
    out = tmp_path / "kept.jsonl"
    main(["curate", path, "--out", str(out), "--data.max_depth", "100"])
    assert len(rows_of(out)) == 100
    few = ["--data.max_row_bytes", "300", "--data.max_reject_share", "1"]
    main(["curate", path, "--out", str(out), *few])
    assert 0 < len(rows_of(out)) < 100


@pytest.mark.parametrize("resume", ["must", "never"])
def test_how_the_run_resumes_does_not_count(resume, model, tmp_path, data):
    _, path = make(model, tmp_path, data, checkpoint={"resume": resume})
    for command, name in (("curate", "kept.jsonl"), ("losses", "losses.jsonl")):
        scratch = tmp_path / f".{name}.run"
        scratch.mkdir()
        (scratch / "metrics.jsonl").touch()  # as a killed one may leave it
        main([command, path, "--out", str(tmp_path / name)])
        assert rows_of(tmp_path / name)


def on_a_rank(config, out):
    return curate(config, out, start_ranks(config))


@pytest.mark.slow
def test_two_ranks_under_zero_3_write_the_same(model, tmp_path, data):
    config, _ = make(model, tmp_path, data, engine={"kind": "deepspeed"})
    alone = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "torch"})})
    assert curate(alone, tmp_path / "one.jsonl", Comm()) == (60, 100)
    results = run_ranks(on_a_rank, 2, config, tmp_path / "two.jsonl")
    assert results == [(60, 100), None]
    one, two = rows_of(tmp_path / "one.jsonl"), rows_of(tmp_path / "two.jsonl")
    losses = [[row["slap"].pop("loss") for row in rows] for rows in (one, two)]
    assert one == two
    np.testing.assert_allclose(*losses, rtol=1e-5)


def writes_slowly(config, out, broken):
    comm = start_ranks(config)
    line, picked = curate_module._line, curate_module._picked

    def scored_then_impatient(run):
        kept = picked(run)
        limit_waiting(0.0)
        assert bool(kept) == (comm.rank == 0)
        return kept

    def slow_line(row, slap):
        time.sleep(0.1)
        if broken and slap.get("sample_id", 0) & (2**28 - 1) > 50:
            raise OSError("no space left")
        return line(row, slap)

    start._TELL_EVERY_S = 0.2
    curate_module._picked, curate_module._line = scored_then_impatient, slow_line
    try:
        return curate(config, out, comm)
    except (RankError, OtherRankFailed) as error:
        return type(error).__name__


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_ranks_wait_for_a_writer_that_outlasts_their_time_out(broken, model, tmp_path, data):
    config, _ = make(model, tmp_path, data, engine={"kind": "deepspeed"})
    results = run_ranks(writes_slowly, 2, config, tmp_path / "kept.jsonl", broken)
    assert results == (["RankError", "OtherRankFailed"] if broken else [(60, 100), None])
    assert (tmp_path / "kept.jsonl").exists() != broken


def test_mistakes(model, tmp_path, data, capsys, monkeypatch):
    _, path = make(model, tmp_path, data)
    assert ".jsonl.gz" in fails(capsys, "curate", path, "--out", tmp_path / "kept.json")
    out = tmp_path / "kept.jsonl"
    assert "(0, 1]" in fails(capsys, "curate", path, "--out", out, "--keep", "1.5")
    same = ["--out", out, "--dropped", out]
    assert "for the kept rows and for the dropped" in fails(capsys, "curate", path, *same)
    assert "no picks.jsonl" in fails(capsys, "curate", path, "--out", out, "--run", tmp_path)
    rows = [{**row, "slap": "mine"} for row in originals(data).values()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(curate_module, "_picked", None)  # it is told before anything is scored
    assert "'slap' of its own" in fails(capsys, "curate", path, "--out", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".kept*"))


@pytest.mark.parametrize("command", ["curate", "losses"])
def test_random_weights_score_nothing(command, tmp_path, data, capsys):
    fresh = {"model_type": "llama", **SIZES}
    _, path = make("nowhere", tmp_path, data, steps=1)
    raw = yaml.safe_load(Path(path).read_text())
    raw["model"] |= {"path": None, "config": fresh}
    Path(path).write_text(yaml.safe_dump(raw))
    out = tmp_path / "out.jsonl"
    told = fails(capsys, command, path, "--out", out)
    assert f"{command} scores with a model, and model.config makes one of random weights" in told
    assert not out.exists()
    main(["train", path])
    told = fails(capsys, command, path, "--out", out)
    assert f"slap-ds export {tmp_path / 'run'}" in told
    main(["export", str(tmp_path / "run")])
    # Of the line itself: what it says to add works.
    main([command, path, "--out", str(out), *told.split("and add ")[1].split()])
    assert rows_of(out)


def test_a_finished_run_of_the_config_is_left_alone(model, tmp_path, data):
    config, path = make(model, tmp_path, data, steps=2)
    run_config(config)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    main(["curate", path, "--out", str(tmp_path / "kept.jsonl")])
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
