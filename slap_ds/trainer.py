"""The training run: stream -> score -> gather -> select -> scatter -> train -> metrics.

    run = prepare(config)      # data, model, engine, stream, scorer, selector; resumed if asked
    train(run)

Every rank runs this file in lockstep. Whatever decides the course of a step (candidates, deal,
picks, number of rows) is computed from values that all ranks share, or agreed on through `comm`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from slap_ds import checkpoint as checkpoints
from slap_ds.comm import Comm
from slap_ds.config import Config, SelectionConfig, resolve_deepspeed, write_config
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.packing import PackedRow, empty_row
from slap_ds.data.store import TokenStore, build_store
from slap_ds.data.stream import CandidateStream
from slap_ds.data.templates import make_template
from slap_ds.engine import Engine, make_engine, start_ranks, write_deepspeed
from slap_ds.evaluation.loss import evaluate_loss
from slap_ds.metrics import JsonLines, Stopwatch
from slap_ds.models.causal import block_flops, head_flops
from slap_ds.models.load import check_fit, load_config, load_tokenizer
from slap_ds.progress import Progress
from slap_ds.scoring import Curvature, Scorer
from slap_ds.selection import ScoredBatch, Selection, Selector, make_selector, select

T = TypeVar("T")


class OtherRankFailed(RuntimeError):
    """Another rank has already said what is wrong; this one only leaves."""


@dataclass
class Inputs:
    """What a run reads, before any weight is made."""

    model_config: Any
    tokenizer: Any
    train: TokenStore
    eval: TokenStore | None


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
    totals: dict[str, float] = field(default_factory=dict)  # sums over all steps, kept on resume

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit."""
        return {"data_fingerprint": self.inputs.train.fingerprint, "seed": self.config.seed}


def prepare(config: Config) -> Run:
    """Join the other ranks, read the data, build the engine and resume.

    Raises:
        ValueError, FileNotFoundError: a mistake of the user's, in one line.
    """
    make_selector(config.selection.model_dump())
    comm = start_ranks(config)
    run_dir = Path(config.run_dir)
    newest = _newest_checkpoint(config)
    inputs = first_on_each_node(comm, "data", lambda: read_inputs(config))
    comm.agree(-1, "the training data", inputs.train.fingerprint)
    stream, scorer, selector = make_parts(config, inputs.train)
    facts = {"data_fingerprint": inputs.train.fingerprint, "seed": config.seed}
    if newest is not None:
        checkpoints.check_matches(newest, comm.world, facts)
    engine = make_engine(config, inputs.model_config, comm)
    run = Run(config, comm, inputs, engine, stream, scorer, selector)
    if newest is not None:
        state = checkpoints.load(newest, engine, comm, run.facts)
        run.start_step = newest.step
        stream.load_state_dict(state["stream"])
        scorer.load_state_dict(state["scorer"])
        selector.load_state_dict(state["selector"])
        run.totals = dict(state["totals"])
    comm.agree(run.start_step, "the checkpoint to resume from", str(run.start_step))
    if comm.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, run_dir / "config.yaml")
        write_deepspeed(engine, run_dir / "deepspeed.json")
    return run


def read_inputs(config: Config) -> Inputs:
    """Tokenizer, model config and token stores, checked against each other."""
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path or "")
    model_config = load_config(config.model.path, config.model.config)
    check_fit(model_config, tokenizer, config.data.max_tokens)
    template = make_template(config.data.template, tokenizer)
    run_dir = Path(config.run_dir)

    def store(paths: list[str], rejects: str) -> TokenStore:
        data = config.data
        return build_store(
            paths,
            format=data.format,
            template=template,
            max_tokens=data.max_tokens,
            over_length=data.over_length,
            cache_dir=_cache_dir(config),
            max_reject_share=data.max_reject_share,
            rejects_path=run_dir / rejects,
        )

    train = store(config.data.train, "rejects.jsonl")
    held_out = store(config.data.eval, "rejects-eval.jsonl") if config.data.eval else None
    return Inputs(model_config, tokenizer, train, held_out)


def make_parts(config: Config, store: TokenStore) -> tuple[CandidateStream, Scorer, Selector]:
    """The stream, scorer and selector of a configuration, in their starting state."""
    stream = CandidateStream(
        len(store), config.batch.candidates, config.seed, steps=config.steps, epochs=config.epochs
    )
    selector = make_selector(config.selection.model_dump())
    s = config.scoring
    curvature = None
    if s.curvature != "none":
        curvature = Curvature(s.curvature_decay, s.curvature_power, s.curvature_floor)
    return stream, Scorer(selector.needs, curvature), selector


def dry_run(config: Config) -> dict[str, Any]:
    """Everything short of weights: returns what the run would do, for printing.

    Raises:
        ValueError, FileNotFoundError: what `prepare` would raise.
    """
    make_selector(config.selection.model_dump())
    inputs = read_inputs(config)
    stream, _, _ = make_parts(config, inputs.train)
    text = inputs.model_config.get_text_config()
    if config.engine.kind == "deepspeed":
        resolve_deepspeed(config, 1, text.hidden_size)
    budget = budget_at(len(stream) // 2, len(stream), config.batch.candidates, config.selection)
    return {
        "training samples": len(inputs.train),
        "evaluation samples": len(inputs.eval) if inputs.eval else 0,
        "tokens": int(inputs.train.lengths.sum()),
        "trained tokens": int(inputs.train.trained_tokens.sum()),
        "rejected rows": inputs.train.counts.rejected,
        "steps": len(stream),
        "candidates per step": config.batch.candidates,
        "trained per step": budget,
        "epochs of candidates": round(stream.total / len(inputs.train), 2),
        "model": f"{inputs.model_config.model_type}, {text.num_hidden_layers} blocks of width "
        f"{text.hidden_size}, vocabulary {text.vocab_size}",
    }


def train(run: Run) -> None:
    """All steps from `run.start_step` on, with the evaluations and checkpoints that fall due."""
    config, comm = run.config, run.comm
    steps = len(run.stream)
    writer = comm.rank == 0
    metrics = JsonLines(run.run_dir / "metrics.jsonl", run.start_step) if writer else None
    picked = JsonLines(run.run_dir / "picks.jsonl", run.start_step) if writer else None
    progress = Progress(steps, run.start_step, visible=writer)

    def log_evaluation(step: int) -> None:
        result = _evaluate(run, step)
        if metrics is not None and result:
            metrics.write({"event": "eval", "step": step, **result})
            progress.note(f"evaluation loss {result['eval_loss']:.4f} nats per token")

    if run.start_step == 0:
        log_evaluation(-1)
    with progress:
        for step in range(run.start_step, steps):
            batch = CandidateBatch(run.inputs.train, next(run.stream))
            selection, record = train_step(run, step, batch)
            if metrics is not None and picked is not None:
                ids = batch.sample_ids[selection.picks.numpy()].tolist()
                picked.write({"step": step, "ids": ids, "weights": selection.weights.tolist()})
                metrics.write(record)
            progress.advance(record)
            last = step == steps - 1
            if last or _due(step, config.evaluation.every):
                log_evaluation(step)
            if last or _due(step, config.checkpoint.every):
                save(run, step + 1)


def train_step(run: Run, step: int, batch: CandidateBatch) -> tuple[Selection, dict[str, Any]]:
    """One step: score the candidates, choose, train the picks. Returns the picks and the metrics.

    `batch` is the whole candidate batch; each rank works on its share of it.
    """
    config, comm, engine = run.config, run.comm, run.engine
    watch = Stopwatch()
    n = len(batch)
    everything = np.arange(n)
    budget = budget_at(step, len(run.stream), n, config.selection)
    sent_before = comm.bytes_sent
    with watch("step"):
        scored: ScoredBatch | None = None
        if budget < n and run.selector.needs:
            with watch("score"):
                share = batch.share(everything, comm.rank, comm.world)
                rows = batch.rows(share, config.score_row_tokens)
                rows = equal_rows(comm, step, "scoring rows", rows)
                local = engine.score(rows, run.scorer.wants)
            with watch("gather"):
                scores = comm.gather(step, local, n)
                scored = run.scorer.finish(scores, batch.content)
        with watch("select"):
            selection = _select(run, step, n, budget, scored)
        with watch("scatter"):
            selection = comm.broadcast_picks(step, selection)
            picks = selection.picks.numpy()
            mine = batch.share(picks, comm.rank, comm.world)
            weights = dict(zip(picks.tolist(), selection.weights.tolist(), strict=True))
            rows = batch.rows(
                mine, config.batch.micro_batch_tokens, [weights[int(p)] for p in mine]
            )
            rows = equal_rows(comm, step, "training rows", rows)
        with watch("train"):
            response = batch.response_tokens[picks]
            total_weight = float(response @ selection.weights.double().numpy())
            lr = learning_rate(step, len(run.stream), config)
            stats = engine.train(rows, total_weight, lr)
    loss, *loads = _totals(comm, step, stats.loss, int(batch.lengths[mine].sum()))
    record = {
        "event": "train",
        "step": step,
        "loss": loss / total_weight,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "candidates": n,
        "picked": len(picks),
        "candidate_tokens": int(batch.lengths.sum()),
        "trained_tokens": int(batch.lengths[picks].sum()),
        "response_tokens": int(response.sum()),
        "busiest_rank_over_mean": max(loads) / (sum(loads) / len(loads)),
        **_flops(run, batch, picks, scored is not None),
        **watch.seconds,
        "selection_s": sum(watch.seconds.get(f"{p}_s", 0) for p in ("gather", "select", "scatter")),
        "bytes_sent": comm.bytes_sent - sent_before,
        **selection.stats,
    }
    if scored is not None:
        record["candidate_loss"] = float(scored.loss.double().nanmean())
    if engine.device.type == "cuda":
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    for key in ("picked", "trained_tokens", "flops", "step_s", "score_s", "selection_s"):
        run.totals[key] = run.totals.get(key, 0.0) + float(record.get(key, 0.0))
    record["total"] = dict(run.totals)
    return selection, record


def save(run: Run, step: int) -> None:
    """A checkpoint after `step` steps."""
    state = {
        "stream": run.stream.state_dict(),
        "scorer": run.scorer.state_dict(),
        "selector": run.selector.state_dict(),
        "totals": run.totals,
    }
    facts = {**run.facts, "config": run.config.model_dump(mode="json")}
    checkpoints.save(
        run.run_dir, step, run.engine, run.comm, state, facts, run.config.checkpoint.keep_last
    )


def budget_at(step: int, steps: int, candidates: int, selection: SelectionConfig) -> int:
    """M at `step`: round(keep * N), or all N in the warm-up and cool-down and for `full`."""
    warm = step < selection.warmup * steps
    cool = step >= steps - selection.cooldown * steps
    if warm or cool or selection.method == "full":
        return candidates
    return max(1, round(selection.keep * candidates))


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr_ratio of it at the last step."""
    o = config.optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, steps - 1 - o.warmup_steps)
    share = o.min_lr_ratio + (1 - o.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    return o.lr * share


def equal_rows(comm: Comm, step: int, phase: str, rows: list[PackedRow]) -> list[PackedRow]:
    """`rows`, filled up with empty ones to the largest count of any rank."""
    most = int(comm.exchange(step, phase, [len(rows)]).max())
    return rows + [empty_row()] * (most - len(rows))


def first_on_each_node(comm: Comm, phase: str, work: Callable[[], T]) -> T:
    """Run `work` on one rank of each node, then on the others, which find its results on disk.

    Raises:
        OtherRankFailed: the first rank's `work` raised there; only that rank reports it.
    """
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    result, failure = None, None
    for turn in (True, False):
        if first == turn:
            try:
                result = work()
            except Exception as error:
                failure = error
        failed = comm.exchange(-1, phase, [failure is not None])[:, 0]
        if failure is not None:
            raise failure
        if failed.any():
            raise OtherRankFailed(f"{phase}: ranks {failed.nonzero()[0].tolist()} failed")
    assert result is not None
    return result


def _select(
    run: Run, step: int, n: int, budget: int, scored: ScoredBatch | None
) -> Selection | None:
    """Rank 0's choice; None on the others, which receive it."""
    if run.comm.rank != 0:
        return None
    if budget == n:
        return Selection(torch.arange(n), torch.ones(n))
    generator = torch.Generator().manual_seed(_mix(run.config.seed, step))
    # A selector that needs no scores gets a batch of equal ones.
    batch = scored if scored is not None else ScoredBatch(loss=torch.zeros(n))
    return select(run.selector, batch, budget, generator)


def _mix(seed: int, step: int) -> int:
    """A generator seed of its own for every step, so that resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _totals(comm: Comm, step: int, loss: float, tokens: int) -> list[float]:
    """The loss summed over ranks, then each rank's trained tokens."""
    bits = np.asarray([loss], dtype=np.float64).view(np.int64)
    table = comm.exchange(step, "step totals", [int(bits[0]), tokens])
    losses = np.ascontiguousarray(table[:, 0]).view(np.float64)
    return [float(losses.sum()), *table[:, 1].astype(float).tolist()]


def _flops(run: Run, batch: CandidateBatch, picks: Any, scored: bool) -> dict[str, float]:
    """Analytic FLOPs of the step over all ranks, scoring apart."""
    config, parameters = run.inputs.model_config, run.engine.parameters
    wants = run.scorer.wants
    scoring = 0.0
    if scored:
        products = 2 if wants.gradient or wants.diagonal else 1
        scoring = block_flops(config, parameters, batch.lengths.tolist())
        scoring += products * head_flops(config, int(batch.response_tokens.sum()))
    passes = 4 if run.config.model.gradient_checkpointing else 3
    training = passes * block_flops(config, parameters, batch.lengths[picks].tolist())
    training += 3 * head_flops(config, int(batch.response_tokens[picks].sum()))
    return {"flops": scoring + training, "scoring_flops": scoring}


def _cache_dir(config: Config) -> Path:
    fallback = Path.home() / ".cache" / "slap_ds"
    return Path(config.data.cache_dir or os.environ.get("SLAP_CACHE_DIR") or fallback)


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
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _newest_checkpoint(config: Config) -> checkpoints.Checkpoint | None:
    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    found = checkpoints.find(run_dir)
    if resume == "never" and (found or (run_dir / "metrics.jsonl").exists()):
        raise ValueError(
            f"run_dir {config.run_dir!r} holds an earlier run and checkpoint.resume is never: "
            "choose another run_dir, or resume"
        )
    if resume == "must" and not found:
        raise ValueError(
            f"checkpoint.resume is must, but {config.run_dir!r} holds no whole checkpoint"
        )
    return found[-1] if found else None
