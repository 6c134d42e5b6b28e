"""The ledger of a run: when each sample was trained, with what weight and loss, and when not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slap_ds.data.formats import Conversation
from slap_ds.data.reread import reread_few
from slap_ds.data.samples import Rules
from slap_ds.data.sources import find_sources
from slap_ds.data.store import POSITION_BITS
from slap_ds.data.templates import make_template
from slap_ds.jsonl import read_lines
from slap_ds.report.coverage import run_config
from slap_ds.report.draws import draws
from slap_ds.train.chain import KEY, broken_link
from slap_ds.train.inputs import read_inputs


@dataclass
class Entry:
    """What became of a sample; steps count from 0, as in picks.jsonl."""

    id: int
    file: str
    line: int
    # Step, weight in the step's loss, and nats per token as it was scored, if it was.
    trained: list[tuple[int, float, float | None]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)  # steps that drew it and did not pick it

    def record(self) -> dict[str, Any]:
        """The entry as a line of the export."""
        trained = [dict(zip(("step", "weight", "loss"), x, strict=True)) for x in self.trained]
        where = {"id": self.id, "file": self.file, "line": self.line}
        return {**where, "trained": trained, "dropped": self.dropped}


class Ledger:
    """A run's finished steps, by sample.

    Raises:
        FileNotFoundError: no run there, or its data are gone.
        ValueError: the data have changed since, or picks.jsonl was changed after it was written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.config = run_config(run_dir)
        self._inputs = read_inputs(self.config, write_rejects=False)
        store = self._inputs.train
        records = read_lines(run_dir / "picks.jsonl")
        broken = broken_link(records, store.fingerprint)
        if broken is not None:
            raise ValueError(
                f"{run_dir / 'picks.jsonl'}: the line of step {records[broken].get('step')} does "
                "not follow from those before it: the file was changed after it was written, or "
                "the data of the run were"
            )
        self.steps = len(records)
        self.last_link: str | None = records[-1].get(KEY) if records else None
        files = [source.name for source in find_sources(self.config.data.train)]
        places = zip(
            store.sample_ids.tolist(), store.file.tolist(), store.line.tolist(), strict=True
        )
        self.entries = [Entry(i, files[file], line) for i, file, line in places]
        for draw in draws(run_dir, self.config, store):
            losses = draw.losses or [None] * len(draw.picks)
            picked = zip(draw.picks.tolist(), draw.weights, losses, strict=True)
            for place, weight, loss in picked:
                self.entries[place].trained.append((draw.step, weight, loss))
            for place in sorted({*draw.candidates.tolist()} - {*draw.picks.tolist()}):
                self.entries[place].dropped.append(draw.step)

    def find(self, name: str) -> Entry:
        """The entry of a sample by its id, or by `FILE:LINE`, the file's name or its end.

        Raises:
            ValueError: there is none, or more than one.
        """
        if name.isdecimal():
            place = int(name) & ((1 << POSITION_BITS) - 1)
            found = [e for e in self.entries[place : place + 1] if e.id == int(name)]
        else:
            file, _, line = name.rpartition(":")
            found = [e for e in self.entries if str(e.line) == line and _ends(e.file, file)]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} samples are {name!r}, expected one: give an id of picks.jsonl, or "
                "FILE:LINE of a row that was not rejected"
            )
        return found[0]

    def conversation(self, entry: Entry) -> Conversation:
        """What the sample says.

        Raises:
            FileNotFoundError, ValueError: the row can no longer be read.
        """
        data = self.config.data
        place = entry.id & ((1 << POSITION_BITS) - 1)
        rules = Rules.of(data, make_template(data.template, self._inputs.tokenizer))
        return reread_few(self._inputs.train, [place], data.train, rules)[place]

    def lines(self, entry: Entry) -> Iterator[str]:
        """The entry for a terminal."""
        yield f"sample {entry.id}: {entry.file}, line {entry.line}"
        for message in self.conversation(entry).messages:
            yield f"  {message.role}: {message.content}"
        drawn = len(entry.trained) + len(entry.dropped)
        yield f"trained {len(entry.trained)} of the {drawn} times it was a candidate"
        for step, weight, loss in entry.trained:
            scored = "" if loss is None else f", loss {loss:.4f}"
            yield f"  step {step}: weight {weight:.4g}{scored}"
        if entry.dropped:
            yield f"dropped at steps {', '.join(map(str, entry.dropped))}"

    def summary(self) -> Iterator[str]:
        """The run for a terminal."""
        trained = sum(bool(entry.trained) for entry in self.entries)
        dropped = sum(bool(entry.dropped) and not entry.trained for entry in self.entries)
        rest = len(self.entries) - trained - dropped
        yield (
            f"{len(self.entries):,} samples: {trained:,} trained at least once, {dropped:,} drawn "
            f"and always dropped, {rest:,} never drawn"
        )
        if self.last_link is None:
            yield f"{self.steps} steps, written by a version without a chain"
        else:
            yield f"the chain holds over {self.steps} steps; its last hash is {self.last_link}"


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f"/{name}")
