"""The training loop: candidates -> scores -> picks -> one optimizer step -> record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slap_ds import jsonl
from slap_ds.config.outputs import ANSWERS
from slap_ds.train.evaluate import evaluate_loss, value_of
from slap_ds.train.journal import Journal
from slap_ds.train.record import step_record
from slap_ds.train.run import Run
from slap_ds.train.step import choose, plan_step, score, train_on
from slap_ds.train.trace import Trace


class Preempted(Exception):
    """Somebody asked for an early end: the checkpoint is written, and all ranks leave."""


def train(run: Run, callbacks: Sequence[Callable[[Mapping[str, Any]], object]] = ()) -> None:
    """candidates -> scores -> picks -> one optimizer step -> record, then what is due.

    Args:
        callbacks: called on rank 0 with every record of metrics.jsonl; True asks for an early end.

    Raises:
        Preempted: asked to stop, and saved.
    """
    with Journal(run, callbacks) as journal, Trace(run) as trace:
        if run.state.step == 0 or run.state.owes_evaluation:
            evaluated(run, run.state.step - 1, journal)
        for step in run.steps_left():
            trace.at(step)
            plan = plan_step(run, step)
            scored = score(run, plan)
            picks = choose(run, plan, scored)
            result = train_on(run, plan, picks)
            journal.step(step_record(run, plan, scored, picks, result))
            if run_due(run, step, result.stop, journal):
                raise Preempted(
                    f"stopped and saved after {step + 1} steps; start again to continue"
                )
            if run.ended_early:
                journal.ended_early()
                break
        run.saver.wait()
        journal.checkpoints()


def run_due(run: Run, step: int, stop: bool, journal: Journal) -> bool:
    """Evaluate and save where it is due after `step`; returns whether to leave now."""
    run.step_done(step)
    every, last = run.config.evaluation.every, step == len(run.stream) - 1
    evaluates = last or _due(step, every)
    # Whoever asked for a stop may not be willing to wait for an evaluation: it comes after the
    # checkpoint, in this run or in the one that continues.
    run.state.owes_evaluation = evaluates and stop
    better = evaluates and not stop and evaluated(run, step, journal)
    kept = run.config.checkpoint
    ends = (last or run.ended_early) and kept.last
    if ends or _due(step, kept.every) or stop or (kept.best and better):
        save(run, step + 1)
    if stop:
        run.saver.wait()
        if last:
            evaluated(run, step, journal)
    run.saver.poll()
    journal.checkpoints()
    return stop and not last


def evaluated(run: Run, step: int, journal: Journal) -> bool:
    """Evaluate after `step` and write it down; returns whether no evaluation before was as good."""
    result, how = evaluate(run, step), run.config.evaluation
    better = False
    if result and (ANSWERS in result or not how.by_answers):
        value = value_of(result, how.metric)
        better = step >= 0 and run.state.best.note(step + 1, value, higher=how.by_answers)
    journal.evaluation(step, result)
    return better


def evaluate(run: Run, step: int) -> dict[str, Any]:
    """The losses on the evaluation data after `step`, and answers where they are due; {} if there
    are no data."""
    how, last = run.config.evaluation, step == len(run.stream) - 1
    if run.inputs.eval is None:
        return {}
    losses = evaluate_loss(
        run.engine,
        run.comm,
        run.inputs.eval,
        step=step,
        row_tokens=run.config.score_row_tokens,
        max_samples=how.max_samples,
        keep_losses=how.keep_losses,
    )
    if run.exam is None or not how.answers_at(step, last):
        return losses
    return losses | run.exam.take(run.engine, run.comm, step)


def save(run: Run, step: int) -> None:
    """A checkpoint after `step` steps."""
    state = {
        "stream": run.stream.state_dict(),
        "scorer": run.scorer.state_dict(),
        "selector": run.selector.state_dict(),
        **run.state.state_dict(),
    }
    config = run.config.model_dump(mode="json")
    digest = hashlib.sha256(jsonl.dumps(config).encode()).hexdigest()
    facts = {**run.facts, "config": config, "config_sha256": digest, "cursor": run.stream.cursor}
    spared = run.state.best.step if run.config.checkpoint.best else 0
    run.saver.save(step, run.engine, state, facts, spared)


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
