"""What a run drew as candidates and what it kept, by task, source, language, script and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from slap_ds.config.schema import Config
from slap_ds.jsonl import read_lines
from slap_ds.report.draws import draws
from slap_ds.train.evaluate import few_labels
from slap_ds.train.inputs import Inputs, read_inputs

Int64 = npt.NDArray[np.int64]
MIN_DRAWS = 30
STARVED = 0.5
SIGNIFICANCE = 0.01
RULE = (
    f"A slice is starved if at least {MIN_DRAWS} candidates of it were drawn, its share trained is "
    f"less than {STARVED:g} of the share of all candidates, and so few are no accident (binomial "
    f"probability below {SIGNIFICANCE:.0%} / number of slices)."
)
MAX_DECODED = 20_000
# Unicode ranges of letters; what none of them holds is "other".
SCRIPTS = {
    "CJK": ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7AF)),
    "Cyrillic": ((0x0400, 0x052F),),
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
}


@dataclass(frozen=True)
class Slice:
    """Part of the candidates: how many were drawn, how many of them were kept."""

    kind: str  # task, source, ...
    name: str
    drawn: int
    kept: int

    @property
    def share(self) -> float:
        """Trained share of the candidates drawn; NaN if there were none."""
        return self.kept / self.drawn if self.drawn else float("nan")


@dataclass(frozen=True)
class Coverage:
    """Draws and picks of a run's samples."""

    drawn: Int64  # (n,) how often each sample of the store was a candidate
    kept: Int64  # (n,) how often it was trained
    slices: list[Slice]
    loss_deciles: list[float]  # mean share kept of each tenth of a step's candidates by loss; or []

    @property
    def share(self) -> float:
        """Kept / drawn, of all."""
        return float(self.kept.sum() / self.drawn.sum())


@dataclass(frozen=True)
class Labels:
    """What slice each sample of a store belongs to."""

    inputs: Inputs
    kinds: dict[str, tuple[list[str], Int64]]  # kind -> names, (n,) codes into them or -1


def labels_of(config: Config, known: dict[str, Labels]) -> Labels:
    """`label_samples` of what a run read; `known` remembers it for runs of the same data.

    Raises:
        FileNotFoundError, ValueError: the data can no longer be read.
    """
    model = config.model.model_dump_json(include={"path", "config", "tokenizer"})
    key = config.data.model_dump_json() + model
    if key not in known:
        known[key] = label_samples(read_inputs(config, write_rejects=False))
    return known[key]


def cover(run_dir: Path, labels: Labels) -> Coverage:
    """The coverage of a run's finished steps.

    Args:
        labels: `labels_of` its config.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the data have changed since the run.
    """
    store = labels.inputs.train
    drawn, kept = np.zeros(len(store), np.int64), np.zeros(len(store), np.int64)
    for draw in draws(run_dir, run_config(run_dir), store):
        np.add.at(drawn, draw.candidates, 1)
        np.add.at(kept, draw.picks, 1)
    if not drawn.any():
        raise ValueError(f"{str(run_dir)!r} holds no finished step yet")
    deciles = [
        record["kept_by_loss_decile"]
        for record in read_lines(run_dir / "metrics.jsonl")
        if len(record.get("kept_by_loss_decile", [])) == 10
    ]
    return Coverage(
        drawn,
        kept,
        [each for kind in labels.kinds for each in _slices(kind, labels, drawn, kept)],
        np.mean(deciles, axis=0).tolist() if deciles else [],
    )


def run_config(run_dir: Path) -> Config:
    """The config that a run folder was made with.

    Raises:
        FileNotFoundError: there is none.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{str(run_dir)!r} is no run: it has no config.yaml")
    return Config.model_validate(yaml.safe_load(path.read_text("utf-8")))


def merged(parts: Sequence[Sequence[Slice]]) -> list[Slice]:
    """Slices of several runs, added up."""
    sums: dict[tuple[str, str], list[int]] = {}
    for part in parts:
        for each in part:
            total = sums.setdefault((each.kind, each.name), [0, 0])
            total[0] += each.drawn
            total[1] += each.kept
    return [Slice(kind, name, *total) for (kind, name), total in sums.items()]


def starved(slices: Sequence[Slice], share: float) -> list[Slice]:
    """The slices that a method hardly trains.

    A slice is starved if at least 30 candidates of it were drawn, fewer than half as many of them
    were kept as of all candidates (`share`), and that is no accident: the binomial probability of
    so few at the overall share is below 1 % / number of slices.
    """
    from scipy import stats

    tested = [each for each in slices if each.drawn >= MIN_DRAWS]
    return [
        each
        for each in tested
        if each.share < STARVED * share
        and stats.binom.cdf(each.kept, each.drawn, share) < SIGNIFICANCE / len(tested)
    ]


def script_of(text: str) -> str:
    """CJK where it has 30 % of the letters, each of which says more; else what most belong to."""
    counts: dict[str, int] = {}
    for letter in filter(str.isalpha, text):
        code = ord(letter)
        name = next(
            (s for s, spans in SCRIPTS.items() if any(a <= code <= b for a, b in spans)), "other"
        )
        counts[name] = counts.get(name, 0) + 1
    if counts.get("CJK", 0) >= 0.3 * sum(counts.values()) > 0:
        return "CJK"
    return max(counts, key=lambda name: counts[name]) if counts else "other"


def label_samples(inputs: Inputs) -> Labels:
    """Task, source, language as the rows say them; script of the trained tokens; length."""
    store = inputs.train
    kinds: dict[str, tuple[list[str], Int64]] = {}
    for kind, label in (("task", "task"), ("source", "source"), ("language", "lang")):
        names = store.names[label]
        if names != [""]:
            ones, codes = np.ones(len(store), np.int64), getattr(store, label)
            names, codes = few_labels(label, names, codes, ones, say=True)
            kinds[kind] = [name or "(none)" for name in names], np.asarray(codes)
    # The scripts of all would take decoding all; a random part of many says enough.
    generator = np.random.Generator(np.random.Philox(key=[0, len(store)]))
    names = [*SCRIPTS, "other"]
    scripts = np.full(len(store), -1, dtype=np.int64)
    for i in generator.permutation(len(store))[:MAX_DECODED]:
        sample = store[int(i)]  # its trained tokens: the template's words are no language
        answer = inputs.tokenizer.decode(sample.ids[sample.mask], skip_special_tokens=True)
        scripts[i] = names.index(script_of(answer))
    kinds["script"] = names, scripts
    lengths = np.asarray(store.lengths)
    ends = np.unique(np.quantile(lengths, np.linspace(0.1, 1, 10), method="higher"))
    starts = [int(lengths.min()), *(ends[:-1] + 1).tolist()]
    spans = [f"{a}-{b} tokens" for a, b in zip(starts, ends.tolist(), strict=True)]
    kinds["length"] = spans, np.searchsorted(ends, lengths)
    return Labels(inputs, kinds)


def _slices(kind: str, labels: Labels, drawn: Int64, kept: Int64) -> list[Slice]:
    names, codes = labels.kinds[kind]
    known = codes >= 0
    drawn_of, kept_of = (
        np.bincount(codes[known], counts[known], len(names)).astype(int) for counts in (drawn, kept)
    )
    return [
        Slice(kind, name, int(drawn_of[code]), int(kept_of[code]))
        for code, name in enumerate(names)
        if drawn_of[code]
    ]


def said_starved(each: Slice) -> str:
    """A starved slice in words."""
    return (
        f"{each.kind} {each.name!r} is starved: {each.kept} of {each.drawn} candidates trained "
        f"({each.share:.1%}),"
    )
