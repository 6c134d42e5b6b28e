"""The part of the training data that a selection keeps, as a data set for other trainers.

config's model -> plan, score, choose, once over all candidates -> picks, losses
or a run's picks.jsonl                                                       -> times picked
sources, read again -> the kept rows as they were, with a field `slap` -> FILE; the others -> FILE
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import gzip
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import IO, Any

import torch

from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.reread import Origin, reread
from slap_ds.data.samples import Rules
from slap_ds.data.store import POSITION_BITS, TokenStore
from slap_ds.data.templates import make_template
from slap_ds.distributed.comm import Comm
from slap_ds.distributed.startup import while_others_wait
from slap_ds.files import replacing
from slap_ds.jsonl import read_lines
from slap_ds.selection.strata import assign_strata
from slap_ds.train.inputs import Inputs, check_trained, read_inputs
from slap_ds.train.run import Run, prepare
from slap_ds.train.score_pass import sum_pass
from slap_ds.train.step import choose, plan_step, score

SUFFIXES = (".jsonl", ".jsonl.gz")

Said = dict[int, dict[str, Any]]  # position in the store -> what `slap` says of the row


def curate(
    config: Config, out: Path, comm: Comm, dropped: Path | None = None
) -> tuple[int, int] | None:
    """Score all training data once with the config's model and write what its selection keeps; and
    the other rows with their scores to `dropped`.

    Candidate batches, scorer and selector are those of a run, with as many candidates a step;
    warm-up and cool-down do not count. All ranks call this. `slap` holds sample_id, loss (nats per
    response token), picked (1, or 0 of a dropped row), weight, and with method slap the stratum
    within its batch.

    Returns: rows written and samples there were; None on all ranks but 0.

    Raises:
        ValueError: another kind of file is asked for, the config has no trained weights, or what a
            run with this config raises.
    """
    check_name(out, dropped)
    check_trained(config, "curate")
    scratch = out.with_name(f".{out.name}.run")
    try:
        run = prepare(_once_over(config, scratch), comm)
        # What cannot be written should cost no scoring: every rank tries the first row.
        _line(next(_origins(run.config, run.inputs)).row, {})
        said = _picked(run)
        kept = {position for position, slap in said.items() if slap["picked"]}
        written = while_others_wait(
            comm,
            "the curated data",
            comm.rank == 0,
            lambda tell: _write(run.config, run.inputs, said, kept, (out, dropped), tell),
        )
        return None if written is None else (written, len(run.inputs.train))
    finally:
        if comm.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def curate_run(
    config: Config,
    run_dir: Path,
    out: Path,
    keep: float | None = None,
    dropped: Path | None = None,
) -> tuple[int, int]:
    """Write the rows that a run has picked: all of them, or the share `keep` of all samples that
    it picked most often (of equal counts, those it picked last); and the others to `dropped`.

    `slap` holds sample_id, picked (how many times) and weight (the last one; None where it was
    never picked). One process.

    Returns: rows written and samples there were.

    Raises:
        FileNotFoundError: the run has no picks.jsonl.
        ValueError: the picks are not of the config's training data.
    """
    check_name(out, dropped)
    path = run_dir / "picks.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{str(run_dir)!r} is no run with picks: it has no picks.jsonl")
    scratch = out.with_name(f".{out.name}.run")
    try:
        inputs = read_inputs(config.model_copy(update={"run_dir": str(scratch)}))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    store = inputs.train
    said: Said = {}
    last: dict[int, int] = {}
    for number, record in enumerate(read_lines(path)):
        for sample_id, weight in zip(record["ids"], record["weights"], strict=True):
            position = _position(store, sample_id, path)
            slap = said.setdefault(position, {"sample_id": sample_id, "picked": 0})
            slap["picked"] += 1
            slap["weight"] = weight
            last[position] = number
    if not said:
        raise ValueError(f"{path} holds no picks yet")
    kept = set(said)
    if keep is not None:
        order = sorted(said, key=lambda p: (-said[p]["picked"], -last[p], p))
        kept = set(order[: max(1, round(keep * len(store)))])
    for position, sample_id in enumerate(store.sample_ids.tolist()):
        said.setdefault(position, {"sample_id": sample_id, "picked": 0, "weight": None})
    return _write(config, inputs, said, kept, (out, dropped)), len(store)


def check_name(*files: Path | None) -> None:
    """Raise ValueError unless the files' names say JSONL and differ."""
    for out in files:
        if out is not None and not out.name.endswith(SUFFIXES):
            raise ValueError(f"{out}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if len(set(files)) < len(files):
        raise ValueError(f"{files[0]} is named for the kept rows and for the dropped ones")


def _once_over(config: Config, scratch: Path) -> Config:
    raw = config.model_dump(mode="json")
    raw |= {"run_dir": str(scratch), "steps": None, "epochs": 1}
    raw["selection"] |= {"warmup": 0, "cooldown": 0}
    raw["step"] |= {"forward": "separate", "balance": "deal"}
    raw["checkpoint"] |= {"resume": "auto"}  # the scratch folder holds no run of the user's
    return Config.model_validate(raw)


def _picked(run: Run) -> Said:
    """What there is to say of each candidate, picked or not; on all ranks but 0 nothing."""
    options = run.config.selection
    said: Said = {}
    for step, indices in enumerate(run.stream):
        batch = CandidateBatch(run.inputs.train, indices)
        plan = plan_step(run, step, batch)
        scored = score(run, plan)
        selection = choose(run, plan, scored)
        strata = None
        if scored is not None:
            losses = scored.loss.double().cpu()
            if options.method == "slap":
                strata = _strata(losses, options.slap.strata, options.slap.strata_by)
        else:  # a method that looks at no scores
            nats, tokens = sum_pass(
                run.engine,
                run.comm,
                run.inputs.train,
                indices,
                run.config.score_row_tokens,
                step,
            )
            losses = torch.from_numpy(nats / tokens)
        if run.comm.rank != 0:
            continue
        weights = dict(zip(selection.picks.tolist(), selection.weights.tolist(), strict=True))
        for i, loss in enumerate(losses.tolist()):
            said[int(indices[i])] = {
                "sample_id": int(batch.sample_ids[i]),
                "loss": loss if math.isfinite(loss) else None,
                "picked": int(i in weights),
                "weight": weights.get(i),
            } | ({} if strata is None else {"stratum": int(strata[i])})
    return said


def _strata(losses: torch.Tensor, strata: int, by: Any) -> torch.Tensor:
    """(N,) the stratum of each candidate with a finite loss, as `Slap.select` assigns them."""
    finite = torch.isfinite(losses)
    found = torch.full((len(losses),), -1)
    found[finite] = assign_strata(losses[finite], min(strata, int(finite.sum())), by)
    return found


def _position(store: TokenStore, sample_id: int, path: Path) -> int:
    position: int = sample_id & ((1 << POSITION_BITS) - 1)
    if position >= len(store) or int(store.sample_ids[position]) != sample_id:
        raise ValueError(
            f"{path} names sample {sample_id}, which the training data do not hold: they have "
            "changed since the run, or the config is not the run's"
        )
    return position


def _origins(config: Config, inputs: Inputs) -> Iterator[Origin]:
    rules = Rules.of(config.data, make_template(config.data.template, inputs.tokenizer))
    return reread(inputs.train, config.data.train, rules)


def _write(
    config: Config,
    inputs: Inputs,
    said: Said,
    kept: Set[int],
    files: tuple[Path, Path | None],
    tell: Callable[[int], None] = lambda rows: None,
) -> int:
    """Rows `kept` into the first file, the others into the second; returns how many were kept."""
    written = 0
    with contextlib.ExitStack() as stack:
        out, rest = [stack.enter_context(_replaced(file)) if file else None for file in files]
        for number, origin in enumerate(_origins(config, inputs)):
            tell(number)
            keeps = origin.position in kept
            if (file := out if keeps else rest) is not None:
                file.write(_line(origin.row, said[origin.position]) + "\n")
            written += keeps
    assert written == len(kept)
    return written


def _line(row: Mapping[str, Any], slap: Mapping[str, Any]) -> str:
    earlier = row.get("slap")
    if earlier is not None and not (isinstance(earlier, dict) and "sample_id" in earlier):
        raise ValueError(
            "a row has a field 'slap' of its own, where the scores would go: rename it"
        )
    return json.dumps(_plain({**row, "slap": slap}), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value with what tables hold and JSON does not: bytes in base64, dates and times in ISO
    8601, NaN and infinity as null, anything else (decimals, durations) as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


@contextlib.contextmanager
def _replaced(out: Path) -> Iterator[IO[str]]:
    """A text file, gzipped by its suffix, that gets its name once it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part, contextlib.ExitStack() as stack:
        raw: Any = stack.enter_context(part.open("wb"))
        if out.name.endswith(".gz"):
            # Without name and time, so that equal rows give equal files.
            raw = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline="\n"))
