"""What a run is made of: inputs, engine, stream, scorer, selector; fresh or resumed.

run = prepare(config)      # every mistake of the user's is told before the first step
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from slap_ds.engine import Engine, make_engine, start_ranks, write_deepspeed
from slap_ds.scoring import Scorer
from slap_ds.selection import Selector, make_selector
from slap_ds.train.checks import check_boundaries, check_isolation
from slap_ds.train.inputs import Inputs, make_parts, read_inputs


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
    start_step: int = 0
    step: int = 0  # the one in progress
    changed: dict[str, list[Any]] = field(default_factory=dict)  # since the checkpoint: [was, is]
    owes_evaluation: bool = False  # one was due when it was asked to stop
    skipped: int = 0  # steps in a row, up to now, whose loss or gradients were not finite
    totals: dict[str, float] = field(default_factory=dict)  # sums over all steps, kept on resume

    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        kept = self.config.checkpoint
        self.saver = Saver(self.run_dir, self.comm, kept.keep_last, kept.background)

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

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit."""
        return facts_of(self.config, self.inputs.model_config, self.inputs.train.fingerprint)


def prepare(
    config: Config, comm: Comm | None = None, read: Callable[[Config], Inputs] | None = None
) -> Run:
    """Join the other ranks, read the data, build the engine and resume.

    Args:
        comm: if the ranks have been joined already.
        read: gives the inputs; default: `read_inputs`.

    Raises:
        ValueError, FileNotFoundError: a mistake of the user's, in one line.
    """
    make_selector(config.selection.model_dump())
    comm = start_ranks(config) if comm is None else comm
    run_dir = Path(config.run_dir)
    check_shared(run_dir, comm)
    newest = _newest_checkpoint(config, comm)
    inputs = first_on_each_node(
        comm, "data", lambda tell: read(config) if read else read_inputs(config, tell)
    )
    comm.agree(-1, "the training data", inputs.train.fingerprint)
    stream, scorer, selector = make_parts(config, inputs.train)
    if newest is not None:
        facts = facts_of(config, inputs.model_config, inputs.train.fingerprint)
        check_matches(newest, comm.world, facts, config.checkpoint.reshard)
    comm.heart.beat("building the engine")
    engine = make_engine(config, inputs.model_config, comm)
    run = Run(config, comm, inputs, engine, stream, scorer, selector)
    if run.reuses and selector.needs:
        check_boundaries(run)
    if newest is not None:
        comm.heart.beat("loading the checkpoint")
        state = checkpoints.load(newest, engine, comm)
        run.start_step = newest.step
        stream.load_state_dict(state["stream"])
        scorer.load_state_dict(state["scorer"])
        selector.load_state_dict(state["selector"])
        run.totals = dict(state["totals"])
        run.owes_evaluation = bool(state.get("owes_evaluation"))
        run.changed = changed_settings(newest, config.model_dump(mode="json"))
    check_isolation(engine, inputs.model_config, config.model.attention)
    comm.agree(run.start_step, "the checkpoint to resume from", str(run.start_step))
    if comm.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, run_dir / "config.yaml")
        write_deepspeed(engine, run_dir / "deepspeed.json")
    return run


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
