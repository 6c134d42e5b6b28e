"""A compass for selection: do the picks' gradients point where all candidates' point?

    model and data -> a few training steps on all candidates -> batches, each:
        per-sample gradients; every method's picks at equal token cost -> errors, alignments, bias

Minutes instead of training runs. A method that points elsewhere in one step can still train well
and the other way round, so runs at equal cost (`slap-ds study`) confirm what is found here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.stream import CandidateStream
from slap_ds.engine import stop_ranks
from slap_ds.scoring import Scorer, tail_parameters
from slap_ds.selection import ScoredBatch, Selection, Selector, make_selector, select
from slap_ds.train.inputs import make_parts
from slap_ds.train.record import train_step
from slap_ds.train.run import Run, prepare

ALL, RANDOM = "all", "random"
SKETCH = 2**18  # numbers of a count sketch
HELD_OUT = 240  # most evaluation samples whose gradient is held-out data's


@dataclass(frozen=True)
class Question:
    """What is measured.

    Raises:
        ValueError: a number out of range.
    """

    states: Sequence[int] = (0, 60)  # training steps before each measurement, ascending
    batches: int = 20  # candidate batches at each state, also those of the accumulated choice
    share: float = 0.6  # of a batch's tokens, prompts too, that picks may cost
    blocks: int = 0  # sketches of the last so many blocks and the head; 0: all weights, exactly
    random_draws: int = 4  # of the random choice that errors are measured by

    def __post_init__(self) -> None:
        if list(self.states) != sorted(set(self.states)) or min(self.states, default=-1) < 0:
            raise ValueError(f"states are {list(self.states)}, expected ascending steps from 0 on")
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share:g}, expected a number between 0 and 1")
        if self.batches < 1 or self.random_draws < 1 or self.blocks < 0:
            raise ValueError("batches and random_draws must be 1 or more, blocks 0 or more")


def fidelity(
    config: Config, methods: Mapping[str, Config], question: Question
) -> list[dict[str, Any]]:
    """One row for each state and method.

    Args:
        config: the model, data and training between the states (on all candidates).
        methods: label -> a config whose selection and scoring are those of the method; "random"
            and "all" are added.

    Returns rows of `state`, `method`, `tokens` (share of the candidates' tokens that is trained),
    `cost` (of the step, in units of full training: a forward of all if it scores, three of the
    picks), `error` (squared distance of the picks' gradient from all candidates', summed over
    batches, random's = 1), `aligned` (mean cosine with the gradient of the evaluation data),
    `bias` (as `error`, of the means over all batches, of random's = 1), `aligned_mean` (as
    `aligned`, of that mean), `held_out_loss`. Gradients are those of token means, as a step has.

    Raises:
        ValueError: no evaluation data, or a method that cannot be set up.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = config.model.model_copy(update={"gradient_checkpointing": False})
        engine = config.engine.model_copy(update={"kind": "torch"})
        step = config.step.model_copy(update={"forward": "separate"})
        full = config.selection.model_copy(update={"method": "full"})
        changes = {"run_dir": folder, "model": plain, "engine": engine, "step": step}
        run = prepare(config.model_copy(update={**changes, "selection": full}))
        if run.inputs.eval is None:
            raise ValueError("fidelity needs data.eval: held-out data's gradient is its measure")
        rows, done = [], 0
        for state in question.states:
            for number in range(done, state):
                train_step(run, number, CandidateBatch(run.inputs.train, next(run.stream)))
            done = state
            rows += _at_state(run, state, methods, question)
        stop_ranks(run.comm)
    return rows


@dataclass
class Tally:
    """What one method's picks add up to over the batches of a state."""

    error: float = 0.0
    aligned: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    mean: Tensor | float = 0.0  # sum of the picks' gradients

    def add(self, picked: Tensor, whole: Tensor, held_out: Tensor, tokens: float) -> None:
        """A batch: gradients (P,) of the picks, of all candidates, of the held-out data."""
        self.error += float((picked - whole).square().sum())
        self.aligned.append(cosine(picked, held_out))
        self.tokens.append(tokens)
        self.mean = self.mean + picked


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two vectors, in float64."""
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def step_gradient(gradients: Tensor, tokens: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
    """(P,) gradient of the weighted token mean over the picks.

    Args:
        gradients: (N, P) of each sample's loss summed over its response tokens, `tokens` (N,) many.
        picks, weights: (M,).
    """
    return (weights @ gradients[picks]) / (weights @ tokens[picks])


@dataclass(frozen=True)
class _Batch:
    """A candidate batch and its gradients."""

    gradients: Tensor  # (N, P) of the loss summed over response tokens
    tokens: Tensor  # (N,) response tokens
    lengths: Tensor  # (N,) all tokens
    whole: Tensor  # (P,) of all candidates' token mean
    held_out: Tensor  # (P,)

    @classmethod
    def of(cls, run: Run, batch: CandidateBatch, sketch: Gradients, held_out: Tensor) -> _Batch:
        gradients = torch.stack([sketch.of(run, batch, [i]) for i in range(len(batch))])
        tokens = torch.from_numpy(batch.response_tokens).to(gradients)
        every, ones = torch.arange(len(batch)), torch.ones_like(tokens)
        whole = step_gradient(gradients, tokens, every, ones)
        return cls(gradients, tokens, torch.from_numpy(batch.lengths), whole, held_out)

    def add(self, tally: Tally, chosen: Selection) -> None:
        weights = chosen.weights.to(self.gradients)
        picked = step_gradient(self.gradients, self.tokens, chosen.picks, weights)
        trained = float(self.lengths[chosen.picks].sum() / self.lengths.sum())
        tally.add(picked, self.whole, self.held_out, trained)


@dataclass(frozen=True)
class _Method:
    scorer: Scorer
    selector: Selector

    def choose(self, run: Run, batch: CandidateBatch, number: int, most: float) -> Selection:
        """The choice of most candidates whose tokens are at most `most`."""
        seen = ScoredBatch(loss=torch.zeros(len(batch)))
        if self.selector.needs:
            rows = batch.rows(np.arange(len(batch)), run.config.score_row_tokens)
            local = run.engine.score(rows, self.scorer.request(number))
            scores = run.comm.gather(number, local, len(batch))
            seen = self.scorer.finish(scores, batch.content)
            ids, lr = torch.from_numpy(batch.sample_ids), run.config.optimizer.lr
            seen = replace(seen, ids=ids, step=number, lr=lr)
        lengths = torch.from_numpy(batch.lengths)
        for budget in range(len(batch) - 1, 0, -1):
            generator = torch.Generator().manual_seed(1000 * run.config.seed + number)
            chosen = select(self.selector, seen, budget, generator)
            if float(lengths[chosen.picks].sum()) <= most:
                break
        if self.selector.needs:
            self.selector.remember(seen, chosen)
        return chosen


def _at_state(
    run: Run, state: int, methods: Mapping[str, Config], question: Question
) -> list[dict[str, Any]]:
    sketch = Gradients(run.engine.model, question.blocks)
    held_out, loss = _held_out(run, sketch)
    parts = {name: _Method(*make_parts(c, run.inputs.train)[1:]) for name, c in methods.items()}
    random = _Method(run.scorer, make_selector({"method": RANDOM}))
    tallies = {name: Tally() for name in (ALL, RANDOM, *parts)}
    draws = [Tally() for _ in range(question.random_draws)]
    every, whole_mean = run.config.batch.candidates, torch.zeros_like(held_out)
    # Other candidates than those it has been trained on, as far as there are some.
    seed = run.config.seed + 1
    stream = CandidateStream(len(run.inputs.train), every, seed, steps=question.batches)
    for number, indices in enumerate(stream):
        batch = CandidateBatch(run.inputs.train, indices)
        seen = _Batch.of(run, batch, sketch, held_out)
        whole_mean += seen.whole
        most = question.share * float(seen.lengths.sum())
        seen.add(tallies[ALL], Selection(torch.arange(len(batch)), torch.ones(len(batch))))
        for name, method in parts.items():
            seen.add(tallies[name], method.choose(run, batch, number, most))
        for i, tally in enumerate(draws):
            seen.add(tally, random.choose(run, batch, (i + 1) * 10_000 + number, most))
    return _rows(state, parts, tallies, draws, whole_mean, held_out, loss)


def _rows(
    state: int,
    parts: Mapping[str, _Method],
    tallies: dict[str, Tally],
    draws: Sequence[Tally],
    whole: Tensor,
    held_out: Tensor,
    loss: float,
) -> list[dict[str, Any]]:
    """`tallies` in numbers, those of the random choice the means over its draws."""

    def bias(tally: Tally) -> float:
        return float((tally.mean - whole).square().sum())

    unit = float(np.mean([draw.error for draw in draws]))
    unit_bias = float(np.mean([bias(draw) for draw in draws]))
    out = []
    for name, tally in tallies.items():
        several = draws if name == RANDOM else [tally]
        trained = float(np.mean([np.mean(t.tokens) for t in several]))
        scores = name in parts and bool(parts[name].selector.needs)
        out.append(
            {
                "state": state,
                "method": name,
                "tokens": trained,
                "cost": 0.25 + 0.75 * trained if scores else trained,
                "error": float(np.mean([t.error for t in several])) / unit,
                "aligned": float(np.mean([np.mean(t.aligned) for t in several])),
                "bias": float(np.mean([bias(t) for t in several])) / unit_bias,
                "aligned_mean": float(
                    np.mean([cosine(torch.as_tensor(t.mean), held_out) for t in several])
                ),
                "held_out_loss": loss,
            }
        )
    return out


class Gradients:
    """Gradients as one vector: of all weights, or of the last blocks and head as a count sketch.

    A count sketch (Charikar et al. 2002) adds every number, with a random sign, to one of SKETCH
    places; inner products keep their expectation, with a relative error of about 1 / sqrt(SKETCH).
    """

    def __init__(self, model: Any, blocks: int) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.places: list[tuple[Tensor, Tensor]] | None = None
        if blocks:
            self.parameters = _last(model.lm, blocks)
            generator = torch.Generator().manual_seed(0)
            self.places = []
            for p in self.parameters:
                place = torch.randint(SKETCH, (p.numel(),), generator=generator)
                sign = torch.randint(0, 2, (p.numel(),), generator=generator).float() * 2 - 1
                self.places.append((place.to(p.device), sign.to(p.device)))

    def of(self, run: Run, batch: CandidateBatch, positions: Sequence[int]) -> Tensor:
        """(P,) float32: of the loss of these candidates, summed over their response tokens."""
        engine = run.engine
        total = torch.zeros(())
        for row in batch.rows(positions, run.config.batch.micro_batch_tokens):
            total = total.to(engine.device) + engine.model(row.to(engine.device), "train", None)
        found = torch.autograd.grad(total, self.parameters, allow_unused=True)
        values = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.parameters, found, strict=True)
        ]
        if self.places is None:
            return torch.cat([value.detach().float().reshape(-1) for value in values])
        out = torch.zeros(SKETCH, device=engine.device)
        for value, (place, sign) in zip(values, self.places, strict=True):
            out.index_add_(0, place, value.detach().float().reshape(-1) * sign)
        return out


def _last(lm: Any, blocks: int) -> list[torch.nn.Parameter]:
    """The weights of the last blocks and of the head, each once."""
    kept = [p for p in tail_parameters(lm, blocks) if p.requires_grad]
    head = lm.get_output_embeddings().weight
    return list({id(p): p for p in [*kept, head] if p.requires_grad}.values())


def _held_out(run: Run, sketch: Gradients) -> tuple[Tensor, float]:
    """Gradient (P,) and loss of the token mean over evaluation samples."""
    store = run.inputs.eval
    assert store is not None
    generator = np.random.Generator(np.random.Philox(key=[0, len(store)]))
    chosen = np.sort(generator.permutation(len(store))[:HELD_OUT])
    total: Tensor | None = None
    rows = run.config.batch.candidates
    for start in range(0, len(chosen), rows):
        batch = CandidateBatch(store, chosen[start : start + rows])
        part = sketch.of(run, batch, range(len(batch)))
        total = part if total is None else total + part
    assert total is not None
    whole = CandidateBatch(store, chosen)
    packed = whole.rows(np.arange(len(whole)), run.config.score_row_tokens)
    tokens = float(whole.response_tokens.sum())
    loss = float(run.engine.score(packed, run.scorer.request(0)).loss.double().sum()) / tokens
    return total / tokens, loss


def show(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table, those of a state by their alignment."""
    out = Table(title="fidelity of choices at equal token cost (random: error and bias 1)")
    columns = ("tokens", "cost", "error", "bias", "aligned", "aligned_mean")
    for name in ("after", "method", *columns):
        out.add_column(name, justify="left" if name == "method" else "right")
    for row in sorted(rows, key=lambda row: (row["state"], -row["aligned"])):
        numbers = [f"{row[name]:.3f}" for name in columns]
        out.add_row(f"{row['state']} steps", row["method"], *numbers)
    return out
