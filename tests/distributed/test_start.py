"""Before the first step: one run folder for all, data read once a node however long it takes."""

import os
import time
from pathlib import Path

import pytest
import torch

from slap_ds.distributed import startup as start
from slap_ds.distributed.startup import check_shared, first_on_each_node
from slap_ds.distributed.watchdog import watch
from slap_ds.engine import start_ranks
from slap_ds.engine.process_group import take_gpu
from slap_ds.errors import OtherRankFailed, RankError
from slap_ds.train.run import prepare
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

WAITS_S = 3.0


def in_folders(config, folders):
    start._SEEN_WITHIN_S = 0.5
    comm = start_ranks(config)
    try:
        check_shared(Path(folders[comm.rank]), comm)
    except (ValueError, OSError, OtherRankFailed) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_run_folder_that_nodes_do_not_share_is_refused(tmp_path):
    config = tiny_config("unused", tmp_path / "run")
    same = [tmp_path / "one", tmp_path / "other/../one"]
    (tmp_path / "other").mkdir()
    assert run_ranks(in_folders, 2, config, same) == ["", ""]
    assert not list((tmp_path / "one").iterdir())
    for said in run_ranks(in_folders, 2, config, [tmp_path / "one", tmp_path / "other"]):
        assert said.startswith("ValueError: run_dir ")
        assert "is another folder for rank 1 on " in said


def test_a_run_folder_that_rank_0_cannot_write_hangs_nobody(tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config("unused", tmp_path / "run")
    first, second = run_ranks(in_folders, 2, config, [tmp_path / "file/run"] * 2)
    assert "Not a directory" in first
    assert second.startswith("OtherRankFailed")


def long_work(config, failing):
    """Rank 0 works for three times as long as anybody waits."""
    start._TELL_EVERY_S = 0.2
    os.environ["LOCAL_RANK"] = "0" if failing else os.environ["RANK"]
    began = []

    def work(tell):
        began.append(time.monotonic())
        if comm.rank == 1:
            if failing:
                raise ValueError("no such column")
            return "found"
        for rows in range(30 * int(WAITS_S)):
            time.sleep(0.1)
            tell(rows)
        return "made"

    with watch(Path(config.run_dir), int(os.environ["RANK"]), 2, 60.0) as dog:
        comm = start_ranks(config, dog)
        dog.heart.limit_s = WAITS_S
        try:
            return first_on_each_node(comm, "data", work), began[0]
        except (RankError, OtherRankFailed) as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began[0]


def test_waiting_for_data_is_no_standstill_while_they_are_read(tmp_path):
    engine = {"start_timeout_s": WAITS_S}
    config = tiny_config("unused", tmp_path / "run", engine=engine)
    (made, first), (found, second) = run_ranks(long_work, 2, config, False)
    assert (made, found) == ("made", "found")
    assert second - first > 2.5 * WAITS_S  # rank 1 looked for it once it was there


def test_a_mistake_on_one_node_ends_the_work_of_the_others(tmp_path):
    config = tiny_config("unused", tmp_path / "run")
    (first, took_s), (second, _) = run_ranks(long_work, 2, config, True)
    assert first == "OtherRankFailed: data: another rank failed"
    assert second == "RankError: no such column"
    assert took_s < WAITS_S


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(RankError, match=r"local rank 3 sees 1 GPU \(CUDA_VISIBLE_DEVICES is 3\)"):
        take_gpu(3)


def test_what_deepspeed_itself_refuses_is_one_line(tmp_path):
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 4}}'
    )
    config = tiny_config(
        tiny_model(tmp_path / "model"),
        tmp_path / "run",
        engine={"deepspeed": str(tmp_path / "ds.json")},
    )
    (said,) = run_ranks(refusal, 1, config)
    assert said.startswith("engine.deepspeed: DeepSpeed refuses these settings: ")
    assert "stage3_max_live_parameter Extra inputs are not permitted" in said
    assert "http" not in said


def refusal(config):
    with pytest.raises(ValueError, match="DeepSpeed refuses") as caught:
        prepare(config)
    return str(caught.value)
