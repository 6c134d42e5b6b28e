"""Engines: where packed rows meet weights. DeepSpeed at the edge, plain PyTorch for tests.

    score(rows)  -> Scores          no graph, no dropout, the current weights
    train(rows)  -> TrainStats      forward and backward per row, one optimizer step

Under ZeRO-3 every forward and backward is a collective: all ranks must pass the same number of
rows, in the same order. The trainer sees to that; short ranks pass `empty_row()`s.

This is the only module that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slap_ds.comm import Comm
from slap_ds.config import Config
from slap_ds.data.packing import PackedRow
from slap_ds.deepspeed_json import resolve_deepspeed
from slap_ds.launch_env import discover
from slap_ds.metrics import Stopwatch
from slap_ds.models.causal import (
    PackedCausalLM,
    count_parameters,
    enable_checkpointing,
    trainable,
)
from slap_ds.models.load import load_model
from slap_ds.models.lora import add_adapter
from slap_ds.models.reuse import BlockInputs, find_blocks, install
from slap_ds.scoring import HeadScores, Scores, Tail, Wants, collect, tail_parameters


@dataclass(frozen=True)
class TrainStats:
    """One optimizer step, this rank's part; the trainer sums over ranks."""

    loss: float  # nats: weighted sum over this rank's trained tokens
    grad_norm: float  # before clipping, of the whole model
    seconds: dict[str, float]  # forward_s, backward_s, optimizer_s
    boundary_bytes: int = 0  # forward reuse: block inputs this rank held at once


class Engine(ABC):
    """The part both engines share: the loops over rows."""

    model: PackedCausalLM  # the wrapper, not the DeepSpeed engine
    optimizer: Any
    device: torch.device
    hidden_size: int
    parameters: int

    def score(self, rows: Sequence[PackedRow], wants: Wants, keep: bool = False) -> Scores:
        """Head sums of the rows' samples with the current weights, as `model.eval()` gives them:
        no dropout, no graph, no random numbers drawn.

        With `keep` the block inputs are kept for a `train(..., replay=True)` of some of them; a
        model that can do that has no dropout, so `train()` mode computes the same.
        """
        if keep:
            self._inputs().start_scoring()
        else:
            self.model.eval()
        parts: list[HeadScores] = []
        with torch.no_grad():
            if wants.blocks:
                with self._whole(tail_parameters(self.model.lm, wants.blocks)):
                    self.model.tail = Tail(self.model.lm, wants.blocks)
            for row in rows:
                parts.append(self._forward(row.to(self.device), "score", wants))
        self.model.train()
        self.model.tail = None
        return collect([row.positions for row in rows], parts, wants)

    def train(
        self, rows: Sequence[PackedRow], total_weight: float, lr: float, replay: bool = False
    ) -> TrainStats:
        """One optimizer step on the weighted token mean over all rows of all ranks.

        With `replay` the rows' samples are among those of the last `score(..., keep=True)`.

        Args:
            total_weight: sum over every trained token, all ranks, of its sample's weight.
            lr: the step's learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if replay:
            self._inputs().start_replay(rows)
        watch = Stopwatch(self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, row in enumerate(rows):
            with watch("forward"):
                part = self._forward(row.to(self.device), "train", None)
            loss += part.detach()
            with watch("backward"):
                self._backward(part, total_weight, last=i == len(rows) - 1)
        with watch("optimizer"):
            grad_norm = self._step()
        boundary_bytes = 0
        if replay:
            boundary_bytes = self._inputs().peak_bytes
            self._inputs().stop()
        return TrainStats(float(loss), grad_norm, watch.seconds(), boundary_bytes)

    @property
    def can_reuse(self) -> bool:
        """Whether `score(keep=True)` and `train(replay=True)` work with this model."""
        return self.model.block_inputs is not None

    def _inputs(self) -> BlockInputs:
        assert self.model.block_inputs is not None, "this model is not set up for forward reuse"
        return self.model.block_inputs

    def _whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside, these parameters are whole on every rank."""
        return nullcontext()

    @abstractmethod
    def _forward(self, row: PackedRow, mode: str, wants: Wants | None) -> Any: ...

    @abstractmethod
    def _backward(self, loss: Tensor, total_weight: float, last: bool) -> None: ...

    @abstractmethod
    def _step(self) -> float: ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's share of weights and optimizer state into `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, on the same number of ranks."""


class TorchEngine(Engine):
    """One process, plain PyTorch: the reference that the DeepSpeed engine is tested against."""

    def __init__(self, config: Config, model_config: Any) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lm = _load(config, model_config).to(self.device)
        inputs = _prepare_blocks(config, lm)
        self.model = PackedCausalLM(lm, config.scoring.chunk_tokens, inputs).train()
        self.hidden_size = model_config.get_text_config().hidden_size
        self.parameters = count_parameters(lm)
        self.optimizer = _optimizer(config, trainable(lm))
        self.max_grad_norm = config.optimizer.max_grad_norm

    def _forward(self, row: PackedRow, mode: str, wants: Wants | None) -> Any:
        return self.model(row, mode, wants)

    def _backward(self, loss: Tensor, total_weight: float, last: bool) -> None:
        (loss / total_weight).backward()

    def _step(self) -> float:
        limit = self.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(trainable(self.model), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def save(self, folder: Path) -> None:
        model = self.model.lm.state_dict()
        # Frozen weights are where they were loaded from.
        for name, parameter in self.model.lm.named_parameters():
            if not parameter.requires_grad:
                del model[name]
        state = {"model": model, "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "torch.pt", weights_only=True)
        problem = self.model.lm.load_state_dict(state["model"], strict=False)
        trained = {name for name, p in self.model.lm.named_parameters() if p.requires_grad}
        assert not problem.unexpected_keys, problem
        assert not trained & set(problem.missing_keys), problem
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """DeepSpeed, ZeRO 0 to 3."""

    def __init__(self, config: Config, model_config: Any, comm: Comm) -> None:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.hidden_size = model_config.get_text_config().hidden_size
        settings = resolve_deepspeed(config, comm.world, self.hidden_size)
        if settings["zero_optimization"].get("stage") == 3:
            # transformers looks for a living config object and then partitions while loading;
            # zero.Init around from_config fails.
            self._partitioner = HfDeepSpeedConfig(settings)
        lm = _load(config, model_config)
        inputs = _prepare_blocks(config, lm)
        self.partitioned = settings["zero_optimization"].get("stage") == 3
        lora = config.model.lora
        self.adapts = lora is not None
        if self.partitioned and (config.model.gradient_checkpointing or (lora and lora.use_dora)):
            # One gather a block. Replay skips the inside of a block in the forward, so the hooks
            # have to sit on the block itself; DoRA reads a layer's weight outside that layer.
            # A model without one list of blocks runs with finer hooks, and without replay.
            with contextlib.suppress(ValueError):
                deepspeed.utils.set_z3_leaf_modules(lm, [type(find_blocks(lm)[0])])
        self.model = PackedCausalLM(lm, config.scoring.chunk_tokens, inputs)
        self.parameters = count_parameters(lm)
        self.world = comm.world
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=_optimizer(config, trainable(lm)),
            config=settings,
        )
        limit_waiting(config.engine.timeout_s)
        self.engine.train()
        self.optimizer = self.engine.optimizer
        self.device = torch.device(self.engine.device)
        self.settings = settings
        self._traced = False

    def score(self, rows: Sequence[PackedRow], wants: Wants, keep: bool = False) -> Scores:
        if self.partitioned and not self._traced:
            self._record_trace()
        return super().score(rows, wants, keep)

    def train(
        self, rows: Sequence[PackedRow], total_weight: float, lr: float, replay: bool = False
    ) -> TrainStats:
        self._traced = True
        return super().train(rows, total_weight, lr, replay)

    def _record_trace(self) -> None:
        """Run an empty row forward and backward before the first scoring.

        ZeRO-3 prefetches along the order of modules that it saw first. A forward without backward
        is the beginning of a training row's order and leaves it valid; the other way round it is
        thrown away and recorded anew at every step. The row adds zeros to the gradients.
        """
        self._traced = True
        loss = self._forward(PackedRow.empty().to(self.device), "train", None)
        self._backward(loss, 1.0, last=False)

    def _whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        if self.settings["zero_optimization"].get("stage") != 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        gathered: AbstractContextManager[Any] = GatheredParameters(parameters)
        return gathered

    def _forward(self, row: PackedRow, mode: str, wants: Wants | None) -> Any:
        return self.engine(row, mode, wants)

    def _backward(self, loss: Tensor, total_weight: float, last: bool) -> None:
        # DeepSpeed averages gradients over ranks; the loss is a sum over all of them.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (self.world / total_weight), scale_wrt_gas=False)

    def _step(self) -> float:
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        # Frozen weights are where they were loaded from.
        self.engine.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=self.adapts
        )

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="engine", load_module_strict=not self.adapts)


def start_ranks(config: Config) -> Comm:
    """Join the process group the launcher set up (`launch_env` knows which); alone: one rank.

    Raises:
        ValueError: several ranks with the one-process engine; a launcher's variables are wrong.
    """
    place = discover(os.environ)
    if config.engine.kind == "torch":
        if place.world > 1:
            raise ValueError(
                f"engine.kind torch runs on one rank, the launcher started {place.world}"
            )
        return Comm()
    import deepspeed

    os.environ.update(place.variables())
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    deepspeed.init_distributed(
        timeout=datetime.timedelta(seconds=config.engine.timeout_s), verbose=False
    )
    backend = dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else "cpu"
    comm = Comm(dist.get_rank(), dist.get_world_size(), torch.device(device))
    if comm.world > 1:
        comm.watch(os.environ["MASTER_ADDR"])
    return comm


def limit_waiting(seconds: float) -> None:
    """Give every process group this time-out; those DeepSpeed makes have torch's 10 or 30 min."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_rank(group) >= 0:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def stop_ranks(comm: Comm) -> None:
    """End a finished run: with several ranks all processes exit here, together, with status 0.

    Not through the interpreter's own exit: a thread of the communication libraries that wakes up
    while it is torn down aborts the process now and then ("terminate called without an active
    exception"), and the launcher takes the finished run for a failed one.
    """
    if comm.world > 1:
        comm.barrier(-1, "the end of the run")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if dist.is_initialized():
        dist.destroy_process_group()


def make_engine(config: Config, model_config: Any, comm: Comm) -> Engine:
    if config.engine.kind == "torch":
        return TorchEngine(config, model_config)
    return DeepSpeedEngine(config, model_config, comm)


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint, under transformers' names, on the CPU.

    Raises:
        FileNotFoundError: `folder` holds no engine state.
    """
    if (folder / "torch.pt").is_file():
        state: dict[str, Tensor] = torch.load(folder / "torch.pt", weights_only=True)["model"]
        return state
    if not (folder / "engine").is_dir():
        raise FileNotFoundError(f"no engine state in {str(folder)!r}")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step it takes
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="engine")
    return {name.removeprefix("lm."): value for name, value in state.items()}


def _load(config: Config, model_config: Any) -> Any:
    lm = load_model(
        config.model.path,
        model_config,
        dtype=config.model.dtype,
        attention=config.model.attention,
        seed=config.seed,
    )
    if config.model.lora is not None:
        add_adapter(lm, config.model.lora, config.seed)
    return lm


def _prepare_blocks(config: Config, lm: Any) -> BlockInputs | None:
    """Activation checkpointing as configured; the recorder where the forward is to be reused.

    Raises:
        ValueError: reuse is asked for and the model does not allow it.
    """
    if not config.model.gradient_checkpointing:
        return None
    if config.step.forward != "separate":
        try:
            return install(lm, on_host=config.step.boundaries == "host")
        except ValueError as error:
            if config.step.forward == "reuse":
                raise
            if os.environ.get("RANK", "0") == "0":
                print(f"step.forward: separate, because {error}", file=sys.stderr)
    enable_checkpointing(lm)
    return None


def _optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    # torch's own AdamW needs no compiler on the user's machine, unlike DeepSpeed's.
    o = config.optimizer
    return torch.optim.AdamW(
        parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )


def write_deepspeed(engine: Engine, path: Path) -> None:
    """The DeepSpeed settings as they were used, beside the run's resolved config."""
    if isinstance(engine, DeepSpeedEngine):
        path.write_text(json.dumps(engine.settings, indent=2) + "\n", encoding="utf-8")


def build_extensions() -> None:
    """Compile what DeepSpeed needs on this accelerator, once, before several ranks want it."""
    if not torch.cuda.is_available():
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)
