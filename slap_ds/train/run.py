"""What a run is made of: inputs, engine, stream, scorer, selector; fresh or resumed.

run = prepare(config)      # every mistake of the user's is told before the first step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slap_ds.checkpoint import find as checkpoints
from slap_ds.checkpoint.match import changed_settings, check_matches, facts_of
from slap_ds.checkpoint.save import Saver
from slap_ds.config.file import write_config
from slap_ds.config.schema import Config
from slap_ds.data.stream import CandidateStream
from slap_ds.distributed.comm import Comm
from slap_ds.distributed.startup import check_shared, first_on_each_node
from slap_ds.engine import Engine, limit_waiting, make_engine, start_ranks, write_deepspeed
from slap_ds.scoring import Scorer
from slap_ds.selection import Selector, make_selector
from slap_ds.train.checks import (
    check_boundaries,
    check_head,
    check_isolation,
    check_reuse,
    check_sharing,
)
from slap_ds.train.exam import Exam, read_exam
from slap_ds.train.inputs import Inputs, make_parts, read_inputs, settled
from slap_ds.train.trackers import check_trackers


@dataclass
class Best:
    """The best evaluation so far, of those after a step."""

    step: int = 0  # how many were done; 0: there was no evaluation yet
    value: float | None = None
    waited: int = 0  # evaluations in a row since then
    metric: str = ""  # what `value` is of

    def note(self, step: int, value: float, higher: bool) -> bool:
        """An evaluation after `step` steps; returns whether it is the best.

        Args:
            higher: values are better than lower ones.
        """
        better = self.value is None or (value > self.value if higher else value < self.value)
        if better and math.isfinite(value):
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False


@dataclass
class TrainState:
    """How far a run has come; saved with its checkpoints, whose name has the step."""

    step: int = 0  # how many are done
    skipped: int = 0  # steps in a row, up to now, whose loss or gradients were not finite
    totals: dict[str, float] = field(default_factory=dict)  # sums over all steps
    owes_evaluation: bool = False  # one was due when the run was asked to stop
    best: Best = field(default_factory=Best)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "totals": self.totals,
            "owes_evaluation": self.owes_evaluation,
            "best": asdict(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue after `step` steps; what was best by another metric is forgotten."""
        self.step, self.totals = step, dict(state["totals"])
        self.owes_evaluation = bool(state.get("owes_evaluation"))
        best = Best(**{"metric": self.best.metric, **state.get("best", {})})
        if best.metric == self.best.metric:
            self.best = best


@dataclass
class Run:
    """Everything a step needs."""

    config: Config
    comm: Comm
    inputs: Inputs
    engine: Engine
    stream: CandidateStream
    scorer: Scorer
    selector: Selector
    state: TrainState = field(default_factory=TrainState)
    changed: dict[str, list[Any]] = field(default_factory=dict)  # since the checkpoint: [was, is]
    exam: Exam | None = None  # with evaluation.answers

    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        kept = self.config.checkpoint
        self.saver = Saver(self.run_dir, self.comm, kept.keep_last, kept.background)
        self.state.best.metric = self.config.evaluation.metric

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.config.run_dir)

    @property
    def reuses(self) -> bool:
        """Whether the scoring forward serves as the training forward."""
        return self.engine.can_reuse and self.config.step.forward != "separate"

    @property
    def balance(self) -> str:
        """How picks are spread over ranks, `auto` and selectors without quotas resolved."""
        wanted = self.config.step.balance
        if wanted == "auto":
            wanted = "quota" if self.reuses else "deal"
        if wanted == "quota" and not self.selector.takes_quotas:
            return "none"
        return wanted

    def steps_left(self) -> range:
        """The steps that are not done; none after an early end."""
        return range(self.state.step, self.state.step if self.ended_early else len(self.stream))

    @property
    def ended_early(self) -> bool:
        """Whether evaluations have not got better for so long that the steps left are not made."""
        patience = self.config.evaluation.patience
        left = self.state.step < len(self.stream)
        return left and 0 < patience <= self.state.best.waited

    def step_done(self, step: int) -> None:
        """After the first one nobody waits for data or builds: the shorter time-out applies."""
        self.state.step = step + 1
        limit_s = self.config.engine.timeout_s
        if self.comm.world > 1 and self.comm.heart.limit_s != limit_s:
            self.comm.heart.limit_s = limit_s
            limit_waiting(limit_s)

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit."""
        return facts_of(self.config, self.inputs.model_config, self.inputs.train.fingerprint)


def prepare(
    config: Config,
    comm: Comm | None = None,
    read: Callable[[Config], Inputs] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Run:
    """Join the other ranks, read the data, build the engine and resume.

    Args:
        comm: if the ranks have been joined already.
        read: gives the inputs; default: `read_inputs`.
        tell: is told what begins, where that takes long.

    Raises:
        ValueError, FileNotFoundError: a mistake of the user's, in one line.
    """
    make_selector(config.selection.model_dump())
    check_trackers(config)
    comm = start_ranks(config) if comm is None else comm
    run_dir = Path(config.run_dir)
    check_shared(run_dir, comm)
    newest = _newest_checkpoint(config, comm)
    tell("reading the data")
    inputs = first_on_each_node(
        comm, "data", lambda count: read(config) if read else read_inputs(config, count)
    )
    comm.agree(-1, "the training data", inputs.train.fingerprint)
    config = settled(config, inputs, comm.world)
    stream, scorer, selector = make_parts(config, inputs.train)
    if newest is not None:
        facts = facts_of(config, inputs.model_config, inputs.train.fingerprint)
        check_matches(newest, comm.world, facts, config.checkpoint.reshard)
    exam = None
    if config.evaluation.answers is not None:
        exam = first_on_each_node(comm, "the questions", lambda _: read_exam(config, inputs))
    comm.heart.beat("building the engine")
    tell(f"loading {config.model.path or 'a fresh model'}")
    engine = make_engine(config, inputs.model_config, comm)
    run = Run(config, comm, inputs, engine, stream, scorer, selector, exam=exam)
    if run.reuses and selector.needs:
        check_boundaries(run)
    if newest is not None:
        _resume(run, newest)
    check_sharing(engine, inputs.model_config, config.model.dtype)
    check_isolation(engine, inputs.model_config, config.model.attention)
    check_head(engine, inputs.model_config, config.model.dtype)
    if run.reuses and selector.needs:
        check_reuse(engine, config.step.forward)
    comm.agree(run.state.step, "the checkpoint to resume from", str(run.state.step))
    if comm.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, run_dir / "config.yaml")
        write_deepspeed(engine, run_dir / "deepspeed.json")
    return run


def _resume(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    run.comm.heart.beat("loading the checkpoint")
    state = checkpoints.load(checkpoint, run.engine, run.comm)
    run.stream.load_state_dict(state["stream"])
    run.scorer.load_state_dict(state["scorer"])
    run.selector.load_state_dict(state["selector"])
    run.state.load_state_dict(state, checkpoint.step)
    run.changed = changed_settings(checkpoint, run.config.model_dump(mode="json"))


def _newest_checkpoint(config: Config, comm: Comm) -> checkpoints.Checkpoint | None:
    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    used = checkpoints.find(run_dir) or (run_dir / "metrics.jsonl").exists()
    if resume == "never" and used:
        raise ValueError(
            f"run_dir {config.run_dir!r} holds an earlier run and checkpoint.resume is never: "
            "choose another run_dir, or resume"
        )
    newest = checkpoints.newest(run_dir, comm, config.checkpoint.verify)
    if resume == "must" and newest is None:
        raise ValueError(
            f"checkpoint.resume is must, but {config.run_dir!r} holds no whole checkpoint"
        )
    return newest
