"""A node whose cable is pulled: both sides stop in time, and say who is missing."""

import time

import pytest

pytestmark = [pytest.mark.nodes, pytest.mark.fault_row(4), pytest.mark.timeout(150)]
TIMEOUT_S = 10
ENDLESS = {"steps": 100_000, "engine": {"timeout_s": TIMEOUT_S}}


def cut_while_training(lab, name, jobs):
    """Cut node2 off during the run; seconds until nothing of the run is left on either node."""
    lab.until_step(name, 4, jobs)
    far = lab.cluster.nodes[1]
    start = time.monotonic()
    far.cut()
    try:
        codes = lab.wait(jobs, timeout_s=60)
        lab.until_gone()
        took_s = time.monotonic() - start
    finally:
        far.plug()
    assert 0 not in codes, lab.logs()
    return took_s


def test_under_pdsh(lab, measured):
    name = "unplugged-pdsh"
    job = lab.start(0, "multi_node.sh", lab.config(name, **ENDLESS), f"{name}.log", SSH_LOST_S="6")
    took_s = cut_while_training(lab, name, [job])
    measured("a node cut off under pdsh: nothing left on either", took_s, TIMEOUT_S + 5)
    said = (lab.folder / f"{name}.log").read_text()
    assert "(rank 0): step " in said
    assert "no answer from rank 1 (10.77.0.2)" in said


def test_under_torchrun_each_side_names_the_other(lab, measured):
    name = "unplugged-torchrun"
    jobs = lab.start_torchrun(lab.config(name, **ENDLESS), name)
    took_s = cut_while_training(lab, name, jobs)
    measured("a node cut off under torchrun: nothing left on either", took_s, TIMEOUT_S + 5)
    for rank, other in enumerate(["rank 1 (10.77.0.2)", "rank 0 (10.77.0.1)"]):
        said = (lab.folder / f"{name}-{rank}.log").read_text()
        lines = [line for line in said.splitlines() if "no answer from" in line]
        assert len(lines) == 1, said
        assert f"error (rank {rank}): step " in lines[0]
        assert f"no answer from {other}: " in lines[0]
