"""The training loop: candidates -> step -> metrics -> evaluation and checkpoint where due."""

from __future__ import annotations

import hashlib
from typing import Any

from slap_ds import jsonl
from slap_ds.data.batch import CandidateBatch
from slap_ds.engine import limit_waiting
from slap_ds.jsonl import JsonLines
from slap_ds.train.evaluate import evaluate_loss
from slap_ds.train.progress import Progress
from slap_ds.train.run import Run
from slap_ds.train.step import train_step


class Preempted(Exception):
    """Somebody asked for an early end: the checkpoint is written, and all ranks leave."""


def train(run: Run) -> None:
    """All steps from `run.start_step` on, with the evaluations and checkpoints that fall due."""
    config, comm = run.config, run.comm
    steps = len(run.stream)
    writer = comm.rank == 0
    metrics = JsonLines(run.run_dir / "metrics.jsonl", run.start_step) if writer else None
    picked = JsonLines(run.run_dir / "picks.jsonl", run.start_step) if writer else None
    by_sample = None
    if writer and config.evaluation.keep_losses:
        by_sample = JsonLines(run.run_dir / "eval_samples.jsonl", run.start_step)
    quarantine = JsonLines(run.run_dir / "quarantine.jsonl", run.start_step) if writer else None
    progress = Progress(steps, run.start_step, visible=writer)
    if metrics is not None and run.changed:
        metrics.write({"event": "settings", "step": run.start_step - 1, "changed": run.changed})
        for key, (was, now) in run.changed.items():
            progress.note(f"goes on from step {run.start_step} with {key} {now}, was {was}")
    if run.start_step >= steps:
        progress.note(
            f"{run.run_dir} has done {run.start_step} of {steps} steps, nothing is left to do: "
            "raise steps or epochs, or choose another run_dir"
        )

    def log_evaluation(step: int) -> None:
        result = _evaluate(run, step)
        samples = result.pop("samples", None)
        if by_sample is not None and samples:
            by_sample.write({"step": step, **samples})
        if metrics is not None and result:
            metrics.write({"event": "eval", "step": step, **result})
            progress.note(f"evaluation loss {result['eval_loss']:.4f} nats per token")

    def log_checkpoints() -> None:
        while run.saver.records:
            record = run.saver.records.pop(0)
            if metrics is not None:
                metrics.write(record)

    if run.start_step == 0 or run.owes_evaluation:
        log_evaluation(run.start_step - 1)
    with progress:
        for step in range(run.start_step, steps):
            run.step = step
            batch = CandidateBatch(run.inputs.train, next(run.stream))
            selection, record = train_step(run, step, batch)
            broken = record.pop("quarantine")
            if quarantine is not None:
                for number, reason in broken:
                    quarantine.write({"step": step, "id": number, "reason": reason})
            if metrics is not None and picked is not None:
                ids = batch.sample_ids[selection.picks.numpy()].tolist()
                picked.write({"step": step, "ids": ids, "weights": selection.weights.tolist()})
                metrics.write(record)
            progress.advance(record)
            if step == run.start_step and comm.world > 1:
                comm.heart.limit_s = config.engine.timeout_s
                limit_waiting(config.engine.timeout_s)
            last, stopping = step == steps - 1, "stop" in record
            evaluates = last or _due(step, config.evaluation.every)
            # Who asked to stop may not wait for an evaluation: it comes after the checkpoint, in
            # this run or in the one that goes on.
            run.owes_evaluation = evaluates and stopping
            if evaluates and not stopping:
                log_evaluation(step)
            if (last and config.checkpoint.last) or _due(step, config.checkpoint.every) or stopping:
                save(run, step + 1)
            if stopping:
                run.saver.wait()
                if last:
                    log_evaluation(step)
            run.saver.poll()
            log_checkpoints()
            if stopping and not last:
                raise Preempted(f"stopped and saved after {step + 1} steps; start again to go on")
        run.saver.wait()
        log_checkpoints()


def save(run: Run, step: int) -> None:
    """A checkpoint after `step` steps."""
    state = {
        "stream": run.stream.state_dict(),
        "scorer": run.scorer.state_dict(),
        "selector": run.selector.state_dict(),
        "totals": run.totals,
        "owes_evaluation": run.owes_evaluation,
    }
    config = run.config.model_dump(mode="json")
    digest = hashlib.sha256(jsonl.dumps(config).encode()).hexdigest()
    facts = {**run.facts, "config": config, "config_sha256": digest, "cursor": run.stream.cursor}
    run.saver.save(step, run.engine, state, facts)


def _evaluate(run: Run, step: int) -> dict[str, Any]:
    if run.inputs.eval is None:
        return {}
    return evaluate_loss(
        run.engine,
        run.comm,
        run.inputs.eval,
        step=step,
        row_tokens=run.config.score_row_tokens,
        max_samples=run.config.evaluation.max_samples,
        keep_losses=run.config.evaluation.keep_losses,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
