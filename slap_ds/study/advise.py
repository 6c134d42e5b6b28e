"""Which regime the data look like, before anything is trained: a pilot and rules of thumb.

    config -> a few hundred rows -> losses; answers given their own and others' prompts   `measure`
    measured numbers -> findings -> settings, each with the evidence it rests on          `findings`

The rules come from studies of small models (docs/experiments.md): they say what is worth trying.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

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
    longest_answer,
    ranks,
    size_gain,
    token_weights,
    wrong_answers,
)
from slap_ds.train.run import Run, prepare
from slap_ds.train.score_pass import rows_pass, sum_pass

SCANNED = 20_000  # rows at most that are searched for near-copies
COPY = 0.5  # rows whose answers, and whole texts, overlap by so much are near-copies
COPIES = 0.3  # share of rows with near-copies from which data count as redundant
DOMINANT, AHEAD = 0.5, 3.0  # share of the largest source, and its rows / those of the next
PASSES = 2.0  # passes over the rows from which they count as repeated
WRONG = 0.08  # share of badly fitting answers from which data count as noisy
BLIND = 0.6  # sources of which so many answers seem not to fit are those where it cannot be told
TOLD = 0.2  # share of the rows in other sources, below which nothing is said
WEIGHED = 4096  # rows at most that say how rare a token is
SHOWN = 5  # rows that fit worst, shown where data are noisy
TENTHS = np.linspace(0, 1, 11)
RULE = """\
Rule of thumb where you prune: selection.method sampled, selection.keep 0.6. A step then costs 0.6 of
one on all data; the same cost buys 1 / 0.6 of the steps. It rests on small models and that one keep
ratio (docs/experiments.md); methods that score did not earn their cost there. What it is worth at
your size is not known: compare two short runs at equal cost (docs/studies.md)."""


@dataclass(frozen=True)
class Question:
    """How large the pilot is.

    Raises:
        ValueError: a number out of range.
    """

    rows: int = 256  # drawn from the training data
    prompts: int = 4  # of other rows of its source, that each answer is tried with

    def __post_init__(self) -> None:
        if self.rows < 32 or self.prompts < 2:
            raise ValueError(
                f"rows is {self.rows} and prompts {self.prompts}: a pilot takes 32 rows and 2 "
                "prompts at least"
            )


@dataclass(frozen=True)
class Finding:
    """One thing that the pilot found."""

    regime: str  # duplicates, noise, epochs, dominated; fresh: none of them
    says: str  # what was measured
    do: str  # what the evidence supports


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
    over the rows; `copies` (`share` of the rows with a near-copy, `each` how many a row has, among how
    many they were `searched`); `wrong` (a `Wrong`) and
    `suspects`, the texts whose own prompt explains the answer worst; `source` (`name` and `share`
    of the rows of the largest, `tokens` its share of the response tokens, `ahead` of the next);
    deciles of `loss` (nats per response token), `answer` (tokens) and `response_share` (of a row's
    tokens); `size_gain` (variance of `sampled` in units of random's at equal tokens, by its own
    assumption); `costs`, a row for each kind of step.
    """
    store = run.inputs.train
    if len(store) < 32:
        raise ValueError(f"the training data have {len(store)} rows, a pilot takes 32 at least")
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, len(store)]))
    drawn = generator.permutation(len(store))[: question.rows]
    nats, tokens = sum_pass(run.engine, run.comm, store, drawn, run.config.score_row_tokens)
    wrong, worst = _wrong(run, drawn, question.prompts, generator)
    lengths, response = store.lengths[drawn], store.trained_tokens[drawn]
    selection = config.selection
    return {
        "rows": len(store),
        "drawn": len(drawn),
        "keep": selection.keep,
        "passes": _passes(config, len(store)),
        "copies": _copies(store, drawn, generator),
        "wrong": None if wrong is None else vars(wrong),
        "suspects": [_text(run, int(i)) for i in worst],
        "source": _largest(store),
        "loss": np.nanquantile(nats / tokens, TENTHS).tolist(),
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
    blocks = block_flops(model, run.engine.parameters, store.lengths[drawn].tolist())
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
    overlaps = Overlaps([store[int(i)] for i in searched])
    found = np.array([int((overlaps.of(row) >= COPY).sum()) - 1 for row in range(len(drawn))])
    each = float(found.mean()) * (len(store) - 1) / (len(searched) - 1)
    return {"share": float((found > 0).mean()), "each": each, "searched": len(searched)}


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
    rows, found = _ranked(run, train, drawn, prompts, weights, generator)
    if len(rows) < 32:
        return None, rows[:0]
    by_source = _by_source(train, rows, found)
    yardstick = {}
    if held is not None:
        names = np.array(held.names["source"])[held.source]
        chosen = [
            generator.permutation(np.flatnonzero(names == name))[: len(own)]
            for name, own in by_source.items()
        ]
        kept, theirs = _ranked(run, held, np.concatenate(chosen), prompts, weights, generator)
        yardstick = _by_source(held, kept, theirs)
    worst = rows[np.argsort(-found, kind="stable")][:SHOWN]
    return wrong_answers(prompts, by_source, yardstick, BLIND), worst


def _by_source(store: TokenStore, rows: Ints, found: Floats) -> dict[str, Floats]:
    codes = store.source[rows]
    return {store.names["source"][code]: found[codes == code] for code in np.unique(codes)}


def _ranked(
    run: Run,
    store: TokenStore,
    drawn: Ints,
    prompts: int,
    weights: Floats,
    generator: np.random.Generator,
) -> tuple[Ints, Floats]:
    """Of the drawn rows those that have enough others of their source, and their ranks."""
    rows: list[int] = []
    samples: list[Sample] = []
    for row in drawn.tolist():
        if others := _others(store, row, prompts, generator):
            rows.append(row)
            samples += exchanged(store[row], others, run.config.data.max_tokens)
    if not rows:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    nats, _ = rows_pass(run.engine, run.comm, samples, run.config.score_row_tokens)
    common = np.array([in_common(sample, weights) for sample in samples])
    return np.array(rows), ranks((nats - common).reshape(len(rows), 1 + prompts))


def _others(
    store: TokenStore, row: int, count: int, generator: np.random.Generator
) -> list[Sample]:
    """So many random rows of the same source with other prompts; none where there are fewer."""

    def prompt(sample: Sample) -> Ints:
        return sample.ids[: longest_answer(sample.mask)[0]]

    own, found = prompt(store[row]), []
    for place in generator.permutation(np.flatnonzero(store.source == store.source[row])):
        other = store[int(place)]
        if not np.array_equal(prompt(other), own):
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


def findings(found: Mapping[str, Any]) -> list[Finding]:
    """What `measure`'s numbers say: a finding for each regime, or that the data look fresh."""
    rules = (_redundant, _noisy, _repeated, _dominated)
    out = [finding for rule in rules if (finding := rule(found)) is not None]
    if not any(finding.regime for finding in out):
        says = f"{found['passes']:.1f} passes over rows of which few have near-copies"
        do = (
            "train all data for the whole budget: that stayed better than pruning at less cost. "
            "Where it is too dear, sampled was better than a random choice at the same cost"
        )
        out.append(Finding("fresh", says, do))
    return out


def _redundant(found: Mapping[str, Any]) -> Finding | None:
    copies = found["copies"]
    if copies["share"] < COPIES:
        return None
    says = f"{copies['share']:.0%} of the rows have near-copies, {copies['each']:.1f} each"
    if copies["searched"] < found["rows"]:
        says += f" (at least: {copies['searched']:,} of {found['rows']:,} rows were searched)"
    do = (
        "remove copies first if you can: no selection here looks for them. As they are, sampled "
        "was better than a random choice at the same cost"
    )
    return Finding("duplicates", says, do)


def _noisy(found: Mapping[str, Any]) -> Finding | None:
    wrong = found["wrong"]
    if wrong is None:
        return Finding("", "wrong answers: not tried, too few rows of one source", "")
    share, error, told = wrong["share"], wrong["error"], wrong["told"]
    if told < TOLD:
        says = (
            f"wrong answers: at most {wrong['at_most']:.0%}, which this model cannot tell from "
            "right ones"
        )
        do = "ask again with data.eval of the same sources, and after some training on these data"
        return Finding("", says, do)
    if share < WRONG or share < 2 * error:
        return None
    says = f"about {share:.0%} (+- {2 * error:.0%}) of the answers do not fit their prompts"
    if told < 1:
        says += f", in the sources where it can be told ({told:.0%} of the rows)"
    do = (
        "look at the rows below and mend or drop their like. As they are, sampled was better than "
        "a random choice at the same cost; methods that prefer high losses prefer such rows"
    )
    return Finding("noise", says, do)


def _repeated(found: Mapping[str, Any]) -> Finding | None:
    if found["passes"] < PASSES:
        return None
    says = f"{found['passes']:.1f} passes over {found['rows']:,} rows"
    do = "sampled was better than a random choice at the same cost over three passes"
    return Finding("epochs", says, do)


def _dominated(found: Mapping[str, Any]) -> Finding | None:
    source = found["source"]
    if source["ahead"] is None or source["share"] < DOMINANT or source["ahead"] < AHEAD:
        return None
    says = (
        f"{source['name']!r} has {source['share']:.0%} of the rows and {source['tokens']:.0%} of "
        f"the response tokens, {source['ahead']:.1f} times the rows of the next source"
    )
    do = (
        "if all sources count the same to you, thin it out: no selection here balances sources. As "
        "it is, sampled was better than a random choice at the same cost"
    )
    return Finding("dominated", says, do)


def show(found: Mapping[str, Any]) -> list[Table | str]:
    """The pilot and what follows from it, for a terminal."""
    table = Table("", "smallest", "tenth", "median", "nine tenths", "largest")
    for name, title in (
        ("loss", "loss, nats per response token"),
        ("answer", "response tokens of a row"),
        ("response_share", "response tokens / all tokens"),
    ):
        values = [found[name][i] for i in (0, 1, 5, 9, 10)]
        table.add_row(title, *(f"{v:.0f}" if name == "answer" else f"{v:.2f}" for v in values))
    costs = Table(f"a step, keep {found['keep']:g}", "cost / all data", "TFLOPs")
    for row in found["costs"]:
        costs.add_row(row["step"], f"{row['units']:.2f}", f"{row['flops'] / 1e12:.3g}")
    out: list[Table | str] = [f"pilot: {found['drawn']} of {found['rows']:,} rows", table, costs]
    if found["size_gain"] < 1:
        out.append(
            f"sampled's step has {found['size_gain']:.2f} of the variance of a random choice's at "
            "the same tokens, if tokens' gradients are nearly orthogonal"
        )
    named = findings(found)
    for finding in named:
        out.append(
            f"{finding.regime or '?'}: {finding.says}" + (f"\n  {finding.do}" * bool(finding.do))
        )
    if any(finding.regime == "noise" for finding in named):
        out += ["rows whose answers fit worst:", *(f"  {text}" for text in found["suspects"])]
    return [*out, RULE]
