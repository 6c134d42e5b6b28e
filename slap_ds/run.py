"""What a run is made of: inputs, engine, stream, scorer, selector; fresh or resumed.

run = prepare(config)      # every mistake of the user's is told before the first step
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slap_ds import checkpoint as checkpoints
from slap_ds.comm import Comm
from slap_ds.config import Config
from slap_ds.config_file import write_config
from slap_ds.data.packing import Candidate, make_row
from slap_ds.data.sources import Limits
from slap_ds.data.store import TokenStore, build_store
from slap_ds.data.stream import CandidateStream
from slap_ds.data.templates import make_template
from slap_ds.deepspeed_json import resolve_deepspeed
from slap_ds.engine import Engine, make_engine, start_ranks, write_deepspeed
from slap_ds.models.load import check_fit, check_window, load_config, load_tokenizer
from slap_ds.models.reuse import host_boundary_bytes
from slap_ds.resume import changed_settings, check_matches, facts_of
from slap_ds.scoring import Scorer, ScoringPlan, Wants
from slap_ds.selection import Course, Selector, make_selector
from slap_ds.start import check_shared, first_on_each_node


@dataclass
class Inputs:
    """What a run reads, before any weight is made."""

    model_config: Any
    tokenizer: Any
    train: TokenStore
    eval: TokenStore | None
    validation: TokenStore | None = None  # what selection looks at beside the candidates


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

    saver: checkpoints.Saver = field(init=False)

    def __post_init__(self) -> None:
        kept = self.config.checkpoint
        self.saver = checkpoints.Saver(self.run_dir, self.comm, kept.keep_last, kept.background)

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


def check_isolation(engine: Engine, model_config: Any, attention: str) -> None:
    """Refuse a model in which the samples of a packed row see each other.

    An architecture may ignore `position_ids` and the samples' lengths without a word. So one sample
    is scored twice, in rows that differ in the sample before it alone.

    Raises:
        ValueError: its loss differs.
    """
    vocab = model_config.get_text_config().vocab_size
    ids = np.arange(1, 19) * 7919 % vocab  # a prime, so that they differ
    trained = np.ones(len(ids), dtype=bool)
    rows = [
        make_row([Candidate(0, first, trained[:6]), Candidate(1, ids[6:], trained[6:])])
        for first in (ids[:6], ids[5::-1])
    ]
    loss = engine.score(rows, Wants()).loss
    if abs(float(loss[3] - loss[1])) > 1e-6 * float(loss[1]):
        raise ValueError(
            f"samples of a packed row see each other in {model_config.model_type} with "
            f"model.attention {attention}: try packed, sdpa or flash_attention_2; architectures "
            "that give their attention neither positions nor lengths cannot be trained here"
        )


def check_boundaries(run: Run) -> None:
    """Refuse forward reuse whose block inputs cannot fit, before any step is taken.

    Raises:
        ValueError: the boundaries of a rank's candidates exceed the memory that is free for them.
    """
    text = run.inputs.model_config.get_text_config()
    local = run.config.batch.candidates / run.comm.world * float(run.inputs.train.lengths.mean())
    value = {"float32": 4, "bfloat16": 2}[run.config.model.dtype]
    layers, width = text.num_hidden_layers, text.hidden_size
    need = local * width * (layers + 1) * value
    on_cpu = run.engine.device.type == "cpu"
    on_host = run.config.step.boundaries == "host" or on_cpu
    if on_host and not on_cpu:
        need = host_boundary_bytes(local, run.config.score_row_tokens, layers, width, value)
    if on_host:
        free = _free_host_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", run.comm.world))
    else:
        free = float(torch.cuda.mem_get_info(run.engine.device)[0])
    if need > free:
        raise ValueError(
            f"forward reuse keeps about {need / 2**30:.1f} GiB of block inputs on a rank, "
            f"{free / 2**30:.1f} GiB are free for them on the {'host' if on_host else 'device'}: "
            "lower batch.candidates, use step.boundaries: host, or step.forward: separate"
        )


def _free_host_bytes() -> float:
    with open("/proc/meminfo", encoding="ascii") as file:
        sizes = dict(line.split(":") for line in file)
    return float(sizes["MemAvailable"].split()[0]) * 1024


def read_inputs(
    config: Config,
    progress: Callable[[int], None] | None = None,
    write_rejects: bool = True,
) -> Inputs:
    """Tokenizer, model config and token stores, checked against each other.

    Args:
        progress: called with the rows read so far, of one store after the other.
        write_rejects: put lists of the rows that cannot be used into the run's folder.
    """
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path or "")
    model_config = load_config(config.model.path, config.model.config)
    check_fit(model_config, tokenizer, config.data.max_tokens)
    check_window(model_config, config.model.attention, config.data.max_tokens)
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
            rejects_path=run_dir / rejects if write_rejects else None,
            progress=progress,
            limits=Limits(data.max_row_bytes, data.max_depth),
        )

    train = store(config.data.train, "rejects.jsonl")
    held_out = store(config.data.eval, "rejects-eval.jsonl") if config.data.eval else None
    validation = None
    if config.selection.validation:
        validation = store(config.selection.validation, "rejects-validation.jsonl")
        shared = 0
        if held_out is not None:
            shared = int(np.isin(validation.content, held_out.content).sum())
        if shared:
            raise ValueError(
                f"{shared} samples of selection.validation are in data.eval too: what selection "
                "has looked at cannot measure it; take other samples for one of them"
            )
    return Inputs(model_config, tokenizer, train, held_out, validation)


def make_parts(config: Config, store: TokenStore) -> tuple[CandidateStream, Scorer, Selector]:
    """The stream, scorer and selector of a configuration, in their starting state."""
    stream = CandidateStream(
        len(store), config.batch.candidates, config.seed, steps=config.steps, epochs=config.epochs
    )
    selector = make_selector(config.selection.model_dump())
    ids, candidates = torch.from_numpy(store.sample_ids), config.batch.candidates
    selector.begin(Course(ids, len(stream), candidates))
    scorer = Scorer(ScoringPlan(config.resolved_scoring, selector.needs, config.seed))
    return stream, scorer, selector


def dry_run(config: Config) -> dict[str, Any]:
    """Everything short of weights: returns what the run would do, for printing.

    Raises:
        ValueError, FileNotFoundError: what `prepare` would raise.
    """
    make_selector(config.selection.model_dump())
    # The folder of a run that has begun keeps the rejects of what it trains on.
    begun = (Path(config.run_dir) / "metrics.jsonl").exists()
    inputs = read_inputs(config, write_rejects=not begun)
    stream, _, selector = make_parts(config, inputs.train)
    text = inputs.model_config.get_text_config()
    if config.engine.kind == "deepspeed":
        resolve_deepspeed(config, 1, text.hidden_size)
    middle, candidates = len(stream) // 2, config.batch.candidates
    budget = budget_at(middle, len(stream), candidates, config, selector)
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


def budget_at(step: int, steps: int, candidates: int, config: Config, selector: Selector) -> int:
    """M at `step`: the selector's, or all N in the warm-up and cool-down."""
    selection = config.selection
    warm = step < selection.warmup * steps
    cool = step >= steps - selection.cooldown * steps
    if warm or cool:
        return candidates
    return selector.budget(step, steps, candidates, selection.keep)


def _cache_dir(config: Config) -> Path:
    fallback = Path.home() / ".cache" / "slap_ds"
    return Path(config.data.cache_dir or os.environ.get("SLAP_CACHE_DIR") or fallback)


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
