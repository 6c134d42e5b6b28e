"""From files to a store of tokens, built once.

    sources -> parts, in order, from all cores -> StoreWriter -> renamed: TokenStore

The store lies in a cache folder named after all that decides its content: the bytes of the data
files, the format, the template with its tokenizer, and the length rule. It is built in a folder
beside it, `.building-` and the same name, and renamed once it is whole. A process that dies leaves
that folder, and the next one goes on with what is finished in it. Who builds holds a lock there;
others wait for it, and open the result.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Literal

from slap_ds.data.counts import say_aloud
from slap_ds.data.encoding import Template
from slap_ds.data.formats import check_format
from slap_ds.data.guard import in_order
from slap_ds.data.hashes import source_facts
from slap_ds.data.parts import Part, encode, read_chunks
from slap_ds.data.samples import Rules
from slap_ds.data.sources import Limits, Source, find_sources
from slap_ds.data.store import STORE_VERSION, TokenStore
from slap_ds.data.writer import JOURNAL, StoreWriter, rows_kept
from slap_ds.files import sync

logger = logging.getLogger(__name__)

LOCK = "lock"
ABANDONED_S = 7 * 24 * 3600.0  # without a change, and not locked
WAIT_S = 0.5
MOST_WORKERS = 32
WORKER_BYTES = 4 * 2**20  # of data: for less it is not worth starting one


def build_store(
    paths: Sequence[str],
    *,
    format: str,
    template: Template,
    max_tokens: int,
    over_length: Literal["truncate", "drop"],
    cache_dir: Path,
    max_reject_share: float = 0.1,
    rejects_path: Path | None = None,
    progress: Callable[[int], None] | None = None,
    limits: Limits | None = None,
    workers: int | None = None,
) -> TokenStore:
    """The store of these data, from the cache or newly built.

    Rows that cannot be used are written to `rejects.jsonl` (file, line, reason) in the store's
    folder, and copied to `rejects_path`. `progress` is called with the number of rows done so far.
    `workers` processes tokenise; by default as many as this process has cores, if there is so much
    to do. The store is the same for any number.

    Raises FileNotFoundError (nothing at a path) and ValueError: bad arguments, unreadable file, no
    rows, more than `max_reject_share` of the rows rejected, or no supervised token left.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}: expected 2 or more, a prompt and an answer")
    if over_length not in ("truncate", "drop"):
        raise ValueError(f"over_length is {over_length!r}: expected truncate or drop")
    check_format(format)
    sources = find_sources(paths)
    rules = Rules(format, template, max_tokens, over_length, limits or Limits())
    cache_dir = Path(cache_dir)
    folder = cache_dir / _key(sources, rules, cache_dir)
    store = _open(folder)
    if store is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        try:
            report = progress or (lambda rows: None)
            store = _build(folder, sources, rules, report, workers or _workers(sources))
        except OSError as error:  # a full disk does not say which
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(folder.parent)) from None
    if rejects_path is not None:
        rejects_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "rejects.jsonl", rejects_path)
    _check(store, paths, max_tokens, max_reject_share)
    say_aloud(store.counts, template.notes)
    return store


def _key(sources: Sequence[Source], rules: Rules, cache_dir: Path) -> str:
    """Name of the cache folder: a hash of all that decides the store's content."""
    facts = source_facts(sources, cache_dir)
    length = [rules.max_tokens, rules.over_length, asdict(rules.limits)]
    parts = [STORE_VERSION, facts, rules.format, rules.template.fingerprint(), *length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _workers(sources: Sequence[Source]) -> int:
    size = sum(file.stat().st_size for source in sources for file in source.files)
    return max(1, min(len(os.sched_getaffinity(0)), size // WORKER_BYTES, MOST_WORKERS))


def _open(folder: Path) -> TokenStore | None:
    if not folder.exists():
        return None
    try:
        return TokenStore(folder)
    except ValueError as error:
        logger.warning("the cached data are damaged and will be rebuilt: %s", error)
        return None


def _build(
    folder: Path,
    sources: Sequence[Source],
    rules: Rules,
    progress: Callable[[int], None],
    workers: int,
) -> TokenStore:
    building, lock = _hold(folder, progress)
    with lock:
        with contextlib.suppress(ValueError):  # another process may have been faster
            store = TokenStore(folder)
            shutil.rmtree(building)
            return store
        writer = StoreWriter(building, rules.token_type)
        skip = writer.kept
        try:
            parts = in_order(
                lambda place: read_chunks(sources, rules.limits, skip, place),
                lambda chunk, place: encode(chunk, sources, rules, place).pack(),
                workers,
            )
            with contextlib.closing(parts):
                for part in parts:
                    writer.add(Part.unpack(part))
                    progress(writer.written.counts.rows)
            writer.finish()
        except BaseException:
            if not writer.kept:
                shutil.rmtree(building)
            raise
        finally:
            writer.close()
        return _publish(building, folder)


def _hold(folder: Path, progress: Callable[[int], None]) -> tuple[Path, IO[bytes]]:
    """A folder to build in, with what is finished in it, and the lock to hold meanwhile.

    Where others build there, this waits for them; where the file system has no locks, the folder
    is one of its own.
    """
    building = folder.with_name(f".building-{folder.name}")
    waits = False
    while True:
        building.mkdir(exist_ok=True)
        try:
            lock = (building / LOCK).open("ab")
        except FileNotFoundError:  # its builder has just finished with it
            continue
        try:
            if not _has_lock(lock):
                lock.close()
                building = building.with_name(f"{building.name}-{secrets.token_hex(4)}")
                building.mkdir()
                return building, (building / LOCK).open("ab")
            if os.path.samestat(os.fstat(lock.fileno()), (building / LOCK).stat()):
                return building, lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if not waits:
                logger.warning("another process tokenises the same data: waiting for it")
            waits = True
            progress(rows_kept(building))
            time.sleep(WAIT_S)
        lock.close()


def _publish(building: Path, folder: Path) -> TokenStore:
    """Give the finished store its name, unless another process was faster."""
    while True:
        try:
            os.rename(building, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            for name in (LOCK, JOURNAL):
                (folder / name).unlink()
            sync(folder.parent)
            return TokenStore(folder)
        try:
            store = TokenStore(folder)
        except ValueError:
            # A damaged one holds the name. Taking it away before the new one was ready would have
            # left other processes with nothing.
            aside = building.with_name(f"{building.name}-{secrets.token_hex(4)}-damaged")
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            shutil.rmtree(building)
            return store


def _has_lock(lock: IO[bytes]) -> bool:
    """Take the lock, until the file is closed; False where the file system has no locks.

    Raises BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def remove_abandoned(cache_dir: Path) -> None:
    """Remove the building folders that nobody holds and nobody has changed for `ABANDONED_S`."""
    for folder in cache_dir.glob(".building-*"):
        with contextlib.suppress(OSError):
            changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - changed > ABANDONED_S:
                with (folder / LOCK).open("ab") as lock:
                    _has_lock(lock)
                    shutil.rmtree(folder)


def _check(
    store: TokenStore, paths: Sequence[str], max_tokens: int, max_reject_share: float
) -> None:
    """Raise ValueError where there is nothing to train on, or too little of what there was."""
    counts = store.counts
    if counts.rows == 0:
        raise ValueError(f"the data set is empty: no rows in {', '.join(paths)}")
    with (store.folder / "rejects.jsonl").open(encoding="utf-8") as file:
        first = [json.loads(line) for line in itertools.islice(file, 3)]
    reasons = "; ".join(f"{r['file']}, line {r['line']}: {r['reason']}" for r in first)
    if counts.rejected > max_reject_share * counts.rows:
        raise ValueError(
            f"{counts.rejected} of {counts.rows} rows cannot be used, more than the share of"
            f" {max_reject_share:g} that may be rejected; the first: {reasons}"
        )
    if len(store) == 0:
        raise ValueError(
            f"no supervised tokens: of {counts.rows} rows {counts.dropped_too_long} are longer than"
            f" max_tokens = {max_tokens} and were dropped, {counts.dropped_no_trained_tokens} have"
            f" no answer within max_tokens, {counts.rejected} cannot be used"
            + (f"; the first: {reasons}" if reasons else "")
        )
