"""A pilot on a run's model and data: what can be seen before anything is trained.

    config -> a few hundred rows -> losses, near-copies among all rows, answers given their own and
    others' prompts; lengths, sources, passes, costs -> numbers, for findings.py

Nothing is trained. All ranks call `advise` and get the same numbers.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slap_ds.config.schema import Config
from slap_ds.data.store import Sample, TokenStore
from slap_ds.data.stream import CandidateStream
from slap_ds.distributed.comm import Comm
from slap_ds.models.causal import block_flops, head_flops
from slap_ds.study.pilot import (
    Floats,
    Ints,
    Overlaps,
    Work,
    Wrong,
    exchanged,
    in_common,
    likeness,
    longest_answer,
    ranks,
    size_gain,
    token_weights,
    wrong_answers,
)
from slap_ds.train.run import Run, prepare
from slap_ds.train.score_pass import rows_pass, sum_pass

SCANNED, SCANNED_TOKENS = 20_000, 8_000_000  # at most searched for near-copies
COPY = 0.5  # rows whose answers, and whole texts, overlap by so much are near-copies
BLIND = 0.6  # sources of which so many answers seem not to fit are those where it cannot be told
WEIGHED = 4096  # rows at most that say how rare a token is
TRIED = 64  # rows of its source among which others for a row are looked for
LEAST = 32  # rows, below which a share says nothing
SHOWN = 5  # rows that fit worst, shown where data are noisy
TENTHS = np.linspace(0, 1, 11)


@dataclass(frozen=True)
class Question:
    """How large the pilot is.

    Raises:
        ValueError: a number out of range.
    """

    rows: int = 256  # drawn from the training data
    prompts: int = 4  # of other rows of its source, that each answer is tried with

    def __post_init__(self) -> None:
        if self.rows < LEAST or self.prompts < 2:
            raise ValueError(
                f"rows is {self.rows} and prompts {self.prompts}: a pilot takes {LEAST} rows and 2 "
                "prompts at least"
            )


def advise(config: Config, question: Question, comm: Comm) -> dict[str, Any]:
    """The pilot's numbers (`measure`) on the config's model and data; all ranks call this.

    Raises:
        ValueError: what a run with this config raises, or fewer than 32 rows.
    """
    scratch = Path(config.run_dir).with_name(f".{Path(config.run_dir).name}.advise")
    try:
        raw = config.model_dump(mode="json") | {"run_dir": str(scratch)}
        raw["selection"] |= {"method": "full"}
        raw["checkpoint"] |= {"resume": "auto"}  # the scratch folder holds no run of the user's
        return measure(prepare(Config.model_validate(raw), comm), config, question)
    finally:
        if comm.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def measure(run: Run, config: Config, question: Question) -> dict[str, Any]:
    """What the pilot finds, in JSON values.

    Returns: `rows` of the training data, `drawn` into the pilot, `keep` of the config, `passes`
    over the rows; `copies` (`share` of the rows with a near-copy, `each` how many a row has, `rows`
    searched for them); `wrong` (a `Wrong`, or None) and `suspects`, the texts whose own prompt
    explains the answer worst; `source` (`name` and `share` of the rows of the largest, `tokens` its
    share of the response tokens, `ahead` of the next); deciles of `loss` (nats per response token),
    `answer` (tokens) and `response_share` (of a row's tokens); `size_gain` (variance of `sampled`
    in units of random's at equal tokens, by its own assumption); `costs`, one a kind of step.
    """
    store = run.inputs.train
    if len(store) < LEAST:
        raise ValueError(
            f"the training data have {len(store)} rows, a pilot takes {LEAST} at least"
        )
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, len(store)]))
    drawn = generator.permutation(len(store))[: question.rows]
    nats, tokens = sum_pass(run.engine, run.comm, store, drawn, run.config.score_row_tokens)
    if not np.isfinite(nats).any():
        raise ValueError(
            "every loss of the pilot is NaN or infinite: the model's weights are broken, or "
            "model.dtype is too narrow for them"
        )
    loss = nats[np.isfinite(nats)] / tokens[np.isfinite(nats)]
    wrong, worst = _wrong(run, drawn, question.prompts, generator)
    lengths, response = store.lengths[drawn], store.trained_tokens[drawn]
    selection = config.selection
    return {
        "rows": len(store),
        "drawn": len(drawn),
        "keep": selection.keep,
        "passes": _passes(run.config, len(store)),
        "copies": _copies(store, drawn, generator),
        "wrong": None if wrong is None else vars(wrong),
        "suspects": [_text(run, int(i)) for i in worst],
        "source": _largest(store),
        "loss": np.quantile(loss, TENTHS).tolist(),
        "answer": np.quantile(response, TENTHS).tolist(),
        "response_share": np.quantile(response / lengths, TENTHS).tolist(),
        "size_gain": size_gain(response, lengths, selection.keep, selection.sampled.least),
        "costs": _work(run, drawn).rows(selection.keep),
    }


def _work(run: Run, drawn: Ints) -> Work:
    """Of a step of the config's candidates that are like the drawn rows; as metrics.jsonl counts it
    (`slap_ds.train.record`)."""
    config, model, store = run.config, run.inputs.model_config, run.inputs.train
    scale = config.batch.candidates / len(drawn)
    blocks = block_flops(model, run.engine.active_parameters, store.lengths[drawn].tolist())
    head = head_flops(model, int(store.trained_tokens[drawn].sum()))
    frozen = config.model.lora is not None
    passes = 3 + config.model.gradient_checkpointing - frozen
    return Work(scale * blocks, scale * head, passes, 3 - frozen, run.reuses)


def _passes(config: Config, rows: int) -> float:
    stream = CandidateStream(
        rows, config.batch.candidates, config.seed, steps=config.steps, epochs=config.epochs
    )
    return len(stream) * config.batch.candidates / rows


def _copies(store: TokenStore, drawn: Ints, generator: np.random.Generator) -> dict[str, float]:
    """Near-copies of the drawn rows among all, or among SCANNED of them."""
    rest = np.setdiff1d(np.arange(len(store)), drawn)
    others = generator.permutation(rest)[: max(0, SCANNED - len(drawn))]
    searched = np.concatenate([drawn, others])
    searched = searched[np.cumsum(store.lengths[searched]) <= SCANNED_TOKENS]
    drawn = drawn[: len(searched)]
    overlaps = Overlaps([store[int(i)] for i in searched])
    found = np.array([int((overlaps.of(row) >= COPY).sum()) - 1 for row in range(len(drawn))])
    each = float(found.mean()) * (len(store) - 1) / (len(searched) - 1)
    return {"share": float((found > 0).mean()), "each": each, "rows": len(searched)}


def _largest(store: TokenStore) -> dict[str, Any]:
    """The source with most rows."""
    rows = np.bincount(store.source, minlength=len(store.names["source"]))
    tokens = np.bincount(store.source, store.trained_tokens, len(rows))
    first, *others = np.argsort(-rows, kind="stable")
    return {
        "name": store.names["source"][first],
        "share": float(rows[first] / rows.sum()),
        "tokens": float(tokens[first] / tokens.sum()),
        "ahead": float(rows[first] / rows[others[0]]) if others else None,
    }


def _wrong(
    run: Run, drawn: Ints, prompts: int, generator: np.random.Generator
) -> tuple[Wrong | None, Ints]:
    """How many answers fit their prompts badly, and the drawn rows that fit worst of all.

    Held-out rows of the same sources, as many of each as were drawn, say how well it can be told.
    None where too few rows have others of their source.
    """
    train, held = run.inputs.train, run.inputs.eval
    known = generator.permutation(len(train))[:WEIGHED]
    vocabulary = run.inputs.model_config.get_text_config().vocab_size
    weights = token_weights([train[int(i)] for i in known], vocabulary)
    rows, misfit = _misfits(run, train, drawn, prompts, weights, generator)
    if len(rows) < LEAST:
        return None, rows[:0]
    by_source = _by_source(train, rows, ranks(misfit))
    yardstick = {}
    if held is not None:
        names = np.array(held.names["source"])[held.source]
        chosen = [
            generator.permutation(np.flatnonzero(names == name))[: len(own)]
            for name, own in by_source.items()
        ]
        kept, theirs = _misfits(run, held, np.concatenate(chosen), prompts, weights, generator)
        yardstick = _by_source(held, kept, ranks(theirs))
    worst = rows[np.argsort(misfit[:, 1:].mean(1) - misfit[:, 0], kind="stable")][:SHOWN]
    return wrong_answers(prompts, by_source, yardstick, BLIND), worst


def _by_source(store: TokenStore, rows: Ints, found: Floats) -> dict[str, Floats]:
    codes = store.source[rows]
    return {store.names["source"][code]: found[codes == code] for code in np.unique(codes)}


def _misfits(
    run: Run,
    store: TokenStore,
    drawn: Ints,
    prompts: int,
    weights: Floats,
    generator: np.random.Generator,
) -> tuple[Ints, Floats]:
    """(P,) those of the drawn rows that have enough others of their source, and (P, 1 + R) how
    badly their answers fit their own and others' prompts, in nats."""
    rows: list[int] = []
    samples: list[Sample] = []
    for row in drawn.tolist():
        if others := _others(store, row, prompts, weights, generator):
            rows.append(row)
            samples += exchanged(store[row], others, run.config.data.max_tokens)
    if not rows:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 1 + prompts))
    nats, _ = rows_pass(run.engine, run.comm, samples, run.config.score_row_tokens)
    common = np.array([in_common(sample, weights) for sample in samples])
    return np.array(rows), (nats - common).reshape(len(rows), 1 + prompts)


def _others(
    store: TokenStore, row: int, count: int, weights: Floats, generator: np.random.Generator
) -> list[Sample]:
    """So many random rows of the same source, whose prompts are no near-copies; none where there
    are fewer."""
    own, found = store[row], []
    of_source = np.flatnonzero(store.source == store.source[row])
    for place in generator.permutation(of_source)[:TRIED]:
        other = store[int(place)]
        if likeness(own, other, weights) < COPY:
            found.append(other)
        if len(found) == count:
            return found
    return []


def _text(run: Run, row: int) -> str:
    """The end of a row's prompt and the beginning of its longest answer, on one line."""
    sample = run.inputs.train[row]
    begin, end = longest_answer(sample.mask)
    parts = sample.ids[max(0, begin - 60) : begin], sample.ids[begin : min(end, begin + 40)]
    decoded = [run.inputs.tokenizer.decode(p.tolist(), skip_special_tokens=True) for p in parts]
    return " -> ".join(" ".join(text.split()) for text in decoded)
