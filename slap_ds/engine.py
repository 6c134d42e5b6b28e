"""Engines: where packed rows meet weights. DeepSpeed at the edge, plain PyTorch for tests.

    score(rows)  -> Scores          no graph, no dropout, the current weights
    train(rows)  -> TrainStats      forward and backward per row, one optimizer step

Under ZeRO-3 every forward and backward is a collective: all ranks must pass the same number of
rows, in the same order. The trainer sees to that; short ranks pass `empty_row()`s.

This is the only module that imports deepspeed.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slap_ds.comm import Comm
from slap_ds.config import Config, resolve_deepspeed
from slap_ds.data.packing import PackedRow
from slap_ds.models.causal import (
    PackedCausalLM,
    count_parameters,
    enable_checkpointing,
    trainable,
)
from slap_ds.models.load import load_model
from slap_ds.scoring import HeadScores, Scores, Wants


@dataclass(frozen=True)
class TrainStats:
    """One optimizer step, this rank's part; the trainer sums over ranks."""

    loss: float  # nats: weighted sum over this rank's trained tokens
    grad_norm: float  # before clipping, of the whole model


class Engine(ABC):
    """The part both engines share: the loops over rows."""

    model: PackedCausalLM  # the wrapper, not the DeepSpeed engine
    optimizer: Any
    device: torch.device
    hidden_size: int
    parameters: int

    def score(self, rows: Sequence[PackedRow], wants: Wants) -> Scores:
        """Head sums of the rows' samples with the current weights, as `model.eval()` gives them:
        no dropout, no graph, no random numbers drawn."""
        self.model.eval()
        parts: list[tuple[Tensor, HeadScores]] = []
        with torch.no_grad():
            for row in rows:
                moved = row.to(self.device)
                parts.append((moved.positions, self._forward(moved, "score", wants)))
        self.model.train()
        zeros = torch.zeros(self.hidden_size, device=self.device)
        none = torch.zeros(0, self.hidden_size, device=self.device)
        diagonals = [s.diagonal for _, s in parts if s.diagonal is not None]
        gradients = [s.gradient for _, s in parts if s.gradient is not None]
        return Scores(
            positions=torch.cat([positions for positions, _ in parts]),
            loss=torch.cat([s.loss for _, s in parts]),
            tokens=torch.cat([s.tokens for _, s in parts]),
            gradient=torch.cat([none, *gradients]) if wants.gradient else None,
            diagonal=sum(diagonals, zeros) if wants.diagonal else None,
        )

    def train(self, rows: Sequence[PackedRow], total_weight: float, lr: float) -> TrainStats:
        """One optimizer step on the weighted token mean over all rows of all ranks.

        Args:
            total_weight: sum over every trained token, all ranks, of its sample's weight.
            lr: the step's learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, row in enumerate(rows):
            part = self._forward(row.to(self.device), "train", None)
            loss += part.detach()
            self._backward(part, total_weight, last=i == len(rows) - 1)
        grad_norm = self._step()
        return TrainStats(loss=float(loss), grad_norm=grad_norm)

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
        self.model = PackedCausalLM(lm, config.scoring.chunk_tokens).train()
        self.hidden_size = model_config.get_text_config().hidden_size
        self.parameters = count_parameters(lm)
        self.optimizer = _optimizer(config, trainable(lm))
        self.max_grad_norm = config.optimizer.max_grad_norm

    def _forward(self, row: PackedRow, mode: str, wants: Wants | None) -> Any:
        return self.model(row, mode, wants)

    def _backward(self, loss: Tensor, total_weight: float, last: bool) -> None:
        (loss / total_weight).backward()  # type: ignore[no-untyped-call]

    def _step(self) -> float:
        limit = self.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(trainable(self.model), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def save(self, folder: Path) -> None:
        state = {"model": self.model.lm.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "torch.pt", weights_only=True)
        self.model.lm.load_state_dict(state["model"])
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
        self.model = PackedCausalLM(lm, config.scoring.chunk_tokens)
        self.parameters = count_parameters(lm)
        self.world = comm.world
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=_optimizer(config, trainable(lm)),
            config=settings,
        )
        self.engine.train()
        self.optimizer = self.engine.optimizer
        self.device = torch.device(self.engine.device)
        self.settings = settings

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
        self.engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="engine")


def start_ranks(config: Config) -> Comm:
    """Join the process group the launcher set up (deepspeed, torchrun); alone: one rank.

    Raises:
        ValueError: several ranks with the one-process engine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.engine.kind == "torch":
        if world > 1:
            raise ValueError(f"engine.kind torch runs on one rank, the launcher started {world}")
        return Comm()
    import deepspeed

    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(
        timeout=datetime.timedelta(seconds=config.engine.timeout_s), verbose=False
    )
    backend = dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else "cpu"
    return Comm(dist.get_rank(), dist.get_world_size(), torch.device(device))


def stop_ranks() -> None:
    """Leave the process group, so that no rank waits for another at exit."""
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
    if config.model.gradient_checkpointing:
        enable_checkpointing(lm)
    return lm


def _optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    # torch's own AdamW needs no compiler on the user's machine, unlike DeepSpeed's.
    o = config.optimizer
    return torch.optim.AdamW(
        parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def write_deepspeed(engine: Engine, path: Path) -> None:
    """The DeepSpeed settings as they were used, beside the run's resolved config."""
    if isinstance(engine, DeepSpeedEngine):
        path.write_text(json.dumps(engine.settings, indent=2) + "\n", encoding="utf-8")


def build_extensions() -> None:
    """Compile what DeepSpeed needs on this accelerator, once, before several ranks want it."""
    if not torch.cuda.is_available():
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)
