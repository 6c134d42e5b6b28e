"""Tasks over worker processes: one that fails, or dies with its worker, costs only itself."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """Why a task has no result."""

    error: str  # one line
    trace: str = ""


@dataclass
class _Worker(Generic[T]):
    process: Any
    pipe: Connection
    task: T | None = None


def run_tasks(
    work: Callable[[T], R], tasks: Sequence[T], jobs: int, preload: str
) -> Iterator[tuple[T, R | Failure]]:
    """(task, result or failure), as they finish, from `jobs` processes that each run many tasks.

    `work` is a module-level function, `preload` the module whose imports the workers share: they
    are forked from one process that has done them. Abandoning the iterator ends the workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = list(reversed(tasks))
    workers: list[_Worker[T]] = []
    try:
        while waiting or any(worker.task is not None for worker in workers):
            while waiting and len(workers) < jobs:
                workers.append(_start(context, work))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task = waiting.pop()
                    worker.pipe.send(worker.task)
            ready = wait([worker.pipe for worker in workers if worker.task is not None])
            for worker in [w for w in workers if w.pipe in ready]:
                task = worker.task
                assert task is not None
                try:
                    result = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    workers.remove(worker)
                    code = worker.process.exitcode
                    result = Failure(f"its process died with exit code {code}")
                worker.task = None
                yield task, result
    finally:
        for worker in workers:
            worker.pipe.close()  # an idle worker ends at that
            if worker.task is not None:
                worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _start(context: Any, work: Callable[[T], R]) -> _Worker[T]:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, there, dict(os.environ)))
    process.start()
    there.close()
    return _Worker(process, here)


def _serve(work: Callable[[T], R], pipe: Connection, environ: dict[str, str]) -> None:
    os.environ.update(environ)  # the fork server has those of when it was started
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result: R | Failure = work(task)
        except Exception as error:
            lines = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {lines[0] if lines else ''}"
            result = Failure(text, traceback.format_exc())
        pipe.send(result)
