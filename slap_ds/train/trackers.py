"""Experiment trackers, `report_to`: what a run writes goes to TensorBoard, W&B, MLflow and Trackio.

    records of metrics.jsonl -> numbers under the keys of docs/trackers.md -> every client

By the clients' own libraries: accelerate's trackers would set up accelerate's process state beside
ours. Rank 0 alone has clients. Accounts come from the environment or the clients' own log-in files,
never from a run file. A client that fails is told of and left out; metrics.jsonl has everything.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from slap_ds.config.outputs import ANSWERS
from slap_ds.config.schema import Config
from slap_ds.engine.peak import peak_of
from slap_ds.files import write_text
from slap_ds.jsonl import read_lines

if TYPE_CHECKING:
    from slap_ds.train.run import Run

_IDS = "trackers.json"  # in the run folder: under which id a continued run goes on


class Client(Protocol):
    """One tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Finite numbers by key, after `step` optimizer steps."""

    def finish(self) -> None:
        """The run has ended, for now or for good."""


def check_trackers(config: Config) -> None:
    """Refuse trackers whose package is not there, before anything is trained.

    Raises:
        ValueError: naming what to install.
    """
    if missing := [name for name in config.report_to if find_spec(name) is None]:
        raise ValueError(
            f"report_to names {', '.join(missing)}, which is not installed here: pip install "
            f"'slap_ds[{','.join(missing)}]'"
        )


class Trackers:
    """All of a run's; `with` ends them."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.clients: dict[str, Client] = {}
        file = run.run_dir / _IDS
        ids: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        for name in run.config.report_to:
            try:
                self.clients[name] = _CLIENTS[name](run.config, run.state.step, ids)
            except Exception as error:
                self._failed(name, error)
        if ids:
            write_text(file, json.dumps(ids))
        self._trained = self._trained_before() if self.clients else set()

    def step(self, metrics: Mapping[str, Any], picks: Sequence[int]) -> None:
        """A finished step: its record, and the ids of the samples trained."""
        if not self.clients:
            return
        self._trained.update(picks)
        numbers = numbers_of_step(metrics, self.run.comm.world, self._peak())
        numbers["selection/coverage"] = len(self._trained) / len(self.run.inputs.train)
        self._log(numbers, metrics["step"] + 1)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A finished evaluation."""
        self._log(numbers_of_evaluation(record), record["step"] + 1)

    def finish(self) -> None:
        for name, client in list(self.clients.items()):
            try:
                client.finish()
            except Exception as error:
                self._failed(name, error)

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        finite = {key: float(x) for key, x in numbers.items() if math.isfinite(x)}
        for name, client in list(self.clients.items()):
            try:
                client.log(finite, step)
            except Exception as error:
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self.clients.pop(name, None)
        first = (masked(str(error)).strip().splitlines() or [""])[0]
        self.say(
            f"report_to {name}: {type(error).__name__}: {first}; the run continues without it, "
            "metrics.jsonl has everything"
        )

    def _peak(self) -> float | None:
        """FLOP/s of a rank's device, where its data sheet is known."""
        device = self.run.engine.device
        if device.type != "cuda":
            return None
        return peak_of(torch.cuda.get_device_name(device), self.run.config.model.dtype)[0]

    def _trained_before(self) -> set[int]:
        """Ids of the samples that the steps of a continued run have trained."""
        file = self.run.run_dir / "picks.jsonl"
        return {i for line in read_lines(file) for i in line["ids"]} if file.exists() else set()


def numbers_of_step(metrics: Mapping[str, Any], world: int, peak: float | None) -> dict[str, float]:
    """The documented keys of a step's record.

    Args:
        peak: FLOP/s of each rank's device; None: unknown, there is no MFU.
    """
    seconds = max(metrics["step_s"], 1e-9)
    numbers = {
        "train/loss": metrics["loss"],
        "train/lr": metrics["lr"],
        "train/grad_norm": metrics["grad_norm"],
        "selection/keep": metrics["picked"] / metrics["candidates"],
        "selection/kept_tokens": metrics["trained_tokens"] / metrics["candidate_tokens"],
        "selection/share": (metrics.get("score_s", 0.0) + metrics["selection_s"]) / seconds,
        "speed/candidate_tokens_per_s": metrics["candidate_tokens"] / seconds,
        "speed/trained_tokens_per_s": metrics["trained_tokens"] / seconds,
        "speed/step_s": metrics["step_s"],
        **{f"total/{name}": value for name, value in metrics["total"].items()},
    }
    further = {
        "candidate_loss": "train/candidate_loss",
        "picked_loss": "train/picked_loss",
        "balance_loss": "train/balance_loss",
        "peak_gib": "memory/peak_gib",
    }
    numbers |= {key: metrics[name] for name, key in further.items() if name in metrics}
    for stratum, budget in enumerate(metrics.get("strata_budgets", ())):
        numbers[f"selection/budget/{stratum}"] = budget
    if peak is not None:
        numbers["speed/mfu"] = metrics["model_flops"] / (seconds * peak * world)
    return numbers


def numbers_of_evaluation(record: Mapping[str, Any]) -> dict[str, float]:
    """The documented keys of an evaluation's record."""
    numbers = {"eval/loss": record["eval_loss"]}
    for task, loss in record.get("eval_loss_by_task", {}).items():
        numbers[f"eval/task/{_in_a_key(task)}"] = loss
    for task, marks in record.get(ANSWERS, {}).items():
        name = _in_a_key(task)
        numbers |= {f"eval/answers/{name}/{metric}": value for metric, value in marks.items()}
    return numbers


def _in_a_key(name: str) -> str:
    """As MLflow, the strictest, takes it; no key may go on where another one ends."""
    return re.sub(r"[^\w .:/-]", "_", name, flags=re.ASCII)


def settings_of(config: Config) -> dict[str, Any]:
    """The run's settings by dotted key, addresses without passwords."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = (
                masked(value) if isinstance(value, str) else json.loads(masked(json.dumps(value)))
            )

    walk("", config.model_dump(mode="json"))
    return flat


def masked(text: str) -> str:
    """Without the user and password of an address."""
    return re.sub(r"://[^/@\s\"]+@", "://***@", text)


def _name(config: Config) -> str:
    return config.tracking.name or Path(config.run_dir).name


class _TensorBoard:
    """Event files in the run folder, `tensorboard --logdir RUN`."""

    def __init__(self, config: Config, first: int, ids: dict[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a continued run takes again are shown once.
        folder = str(Path(config.run_dir) / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=first + 1 if first else None)
        if not first:
            rows = (f"| {key} | {value} |" for key, value in settings_of(config).items())
            self.writer.add_text("settings", "\n".join(["| key | value |", "| --- | --- |", *rows]))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run folder."""

    def __init__(self, config: Config, first: int, ids: dict[str, str]) -> None:
        import wandb

        self.run = wandb.init(
            project=config.tracking.project,
            name=_name(config),
            id=ids.get("wandb"),
            resume="allow",
            dir=config.run_dir,
            config=settings_of(config),
            save_code=False,
        )
        ids["wandb"] = self.run.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()


class _Mlflow:
    """A run on the server of MLFLOW_TRACKING_URI, or in `mlruns` in the run folder."""

    def __init__(self, config: Config, first: int, ids: dict[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or _local_store(config)
        self.client, project = MlflowClient(uri), config.tracking.project
        if "mlflow" not in ids:
            known = self.client.get_experiment_by_name(project)
            home = known.experiment_id if known else self.client.create_experiment(project)
            ids["mlflow"] = self.client.create_run(home, run_name=_name(config)).info.run_id
            params = [Param(key, str(x)[:500]) for key, x in settings_of(config).items()]
            for start in range(0, len(params), 100):  # most that it takes at once
                self.client.log_batch(ids["mlflow"], params=params[start : start + 100])
        self.id = ids["mlflow"]

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics=metrics[start : start + 1000])

    def finish(self) -> None:
        self.client.set_terminated(self.id)


def _local_store(config: Config) -> str:
    # MLflow 3 wants to be told that files, which need no database, are meant.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return (Path(config.run_dir) / "mlruns").resolve().as_uri()


class _Trackio:
    """A run of Trackio; its data lie where TRACKIO_DIR says, `trackio show` shows them."""

    def __init__(self, config: Config, first: int, ids: dict[str, str]) -> None:
        import trackio

        self.run = trackio.init(
            project=config.tracking.project,
            name=ids.get("trackio", _name(config)),
            resume="allow",
            config=settings_of(config),
        )
        ids["trackio"] = self.run.name

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()


_CLIENTS: dict[str, Callable[[Config, int, dict[str, str]], Client]] = {
    "mlflow": _Mlflow,
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
