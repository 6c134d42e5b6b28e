"""What both engines share: the loops over rows, and the parts they are built of.

Under ZeRO-3 every forward and backward is a collective: all ranks must pass the same number of
rows, in the same order. The trainer sees to that; short ranks pass empty rows. Ranks that share
their rows (engine.sequence_parallel) pass the same ones, and each computes its part of them.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slap_ds.compat import attention_of, whole_size
from slap_ds.config.schema import Config
from slap_ds.data.packing import PackedRow
from slap_ds.distributed.heart import Heart
from slap_ds.engine.tensor_files import TensorWriter
from slap_ds.engine.whole_state import Key
from slap_ds.launch.environment import rank_said
from slap_ds.models.attention import NAME as PACKED
from slap_ds.models.causal import (
    PackedCausalLM,
    enable_checkpointing,
    trainable,
)
from slap_ds.models.kernels import use_liger
from slap_ds.models.load import load_model
from slap_ds.models.lora import add_adapter
from slap_ds.models.reuse import BlockInputs, install
from slap_ds.scoring import HeadScores, ScoreRequest, Scores, Tail, collect, tail_parameters
from slap_ds.timing import Stopwatch

MOMENTS: tuple[Key, Key] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainStats:
    """One optimizer step, this rank's part; the trainer sums over ranks."""

    loss: float  # nats: weighted sum over this rank's trained tokens
    grad_norm: float  # before clipping, of the whole model
    seconds: dict[str, float]  # forward_s, backward_s, optimizer_s
    boundary_bytes: int = 0  # forward reuse: block inputs this rank held at once
    # Positions in the candidate batch of samples in rows whose loss is NaN or infinite.
    broken: tuple[int, ...] = ()
    # Mixture of experts: the routers' balance losses, weighted and summed as the loss is.
    balance: float | None = None


class ScoringEngine(ABC):
    """What scores packed rows with a model's current weights, whoever trains them."""

    model: PackedCausalLM  # the wrapper, not what a library wraps around it
    device: torch.device
    heart: Heart = Heart()  # of a rank that nobody waits for

    def score(self, rows: Sequence[PackedRow], request: ScoreRequest, keep: bool = False) -> Scores:
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
            if request.blocks:
                with self._whole(tail_parameters(self.model.lm, request.blocks)):
                    self.model.tail = Tail(self.model.lm, request.blocks)
            for i, row in enumerate(rows):
                self.heart.beat("scoring a row")
                # A row that is trained meets the head first.
                kept = keep and i == len(rows) - 1
                with self._head_kept() if kept else nullcontext():
                    scores = self._forward(self._part(row), "score", request)
                parts.append(self.model.split.total(scores))
        if keep:
            self._inputs().check(self.model.lm)
        self.model.train()
        self.model.tail = None
        return collect([row.positions for row in rows], parts, request)

    def own_loss(self, row: PackedRow) -> float:
        """Nats, summed over the row's trained tokens, as the model's own forward computes them."""
        self.model.eval()
        with torch.no_grad():
            loss = float(self._forward(row.to(self.device), "own", None))
        self.model.train()
        return loss

    @property
    def can_reuse(self) -> bool:
        """Whether `score(keep=True)` and `train(replay=True)` work with this model."""
        return self.model.block_inputs is not None

    def forget_scoring(self) -> None:
        """Let go of what `score(keep=True)` kept; nothing of it will be trained."""
        self._inputs().stop()

    def give_up_reuse(self, reason: str) -> None:
        """Train with ordinary checkpointing from now on, and say why."""
        self.forget_scoring()
        self.model.block_inputs = None
        _say_separate(reason)

    def _part(self, row: PackedRow) -> PackedRow:
        """What this rank computes of a row, on its device."""
        split = self.model.split
        return row.part(split.rank, split.ranks).to(self.device)

    def _inputs(self) -> BlockInputs:
        assert self.model.block_inputs is not None, "this model is not set up for forward reuse"
        return self.model.block_inputs

    def _whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside, these parameters are whole on every rank."""
        return nullcontext()

    def _head_kept(self) -> AbstractContextManager[Any]:
        """The head's weight stays whole after a forward inside, until it is used again."""
        return nullcontext()

    @abstractmethod
    def _forward(self, row: PackedRow, mode: str, request: ScoreRequest | None) -> Any: ...


class Engine(ScoringEngine):
    """A scoring engine that also trains: the part both engines share."""

    kind: str  # engine.kind
    optimizer_kind: str = "torch"  # optimizer.kind
    optimizer: Any
    hidden_size: int
    parameters: int
    active_parameters: int  # that a token meets: fewer in a mixture of experts
    forwards_together: bool = False  # every forward is a collective

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
        losses: list[Tensor] = []
        for i, row in enumerate(rows):
            self.heart.beat("training a row")
            with watch("forward"), self._head_kept():  # the backward begins with it
                part = self._forward(self._part(row), "train", None)
            losses.append(part.detach().double())
            with watch("backward"):
                self._backward(part, total_weight, last=i == len(rows) - 1)
        boundary_bytes = 0
        if replay:  # the optimizer needs the memory too
            boundary_bytes = self._inputs().peak_bytes
            self._inputs().stop()
        self.heart.beat("optimizer step")
        with watch("optimizer"):
            grad_norm = self._step()
        each = torch.stack(losses).tolist()
        bad = [row.where for row, loss in zip(rows, each, strict=True) if not math.isfinite(loss)]
        broken = tuple(itertools.chain.from_iterable(bad))
        return TrainStats(
            math.fsum(each) if not bad else math.nan,
            grad_norm,
            watch.seconds(),
            boundary_bytes,
            broken,
            None if self.model.balance is None else self.model.balance.take(),
        )

    @contextmanager
    def answering(self) -> Iterator[tuple[Any, bool]]:
        """Inside, the language model may generate: it is the first thing given; the second says
        whether every forward needs all ranks."""
        lm, packed = self.model.lm, attention_of(self.model.lm.config) == PACKED
        if packed:  # which knows whole samples alone
            lm.set_attn_implementation("sdpa")
        self.model.eval()
        beat = lm.register_forward_pre_hook(lambda *_: self.heart.beat("answering"))
        try:
            with self._order_of_answers():
                yield lm, self.forwards_together
        finally:
            beat.remove()
            self.model.train()
            if packed:
                lm.set_attn_implementation(PACKED)

    def _order_of_answers(self) -> AbstractContextManager[Any]:
        """Inside, forwards that are not rows'."""
        return nullcontext()

    @abstractmethod
    def _backward(self, loss: Tensor, total_weight: float, last: bool) -> None: ...

    @abstractmethod
    def _step(self) -> float:
        """The optimizer's step; returns the gradients' norm before clipping.

        Gradients that are NaN or infinite change nothing, on any rank; the norm is then inf.
        """

    @abstractmethod
    def save(self, folder: Path, writer: TensorWriter) -> None:
        """Write this rank's share of weights and optimizer state into `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, on the same number of ranks.

        Raises:
            ValueError: a file is damaged or holds more than tensors; named, and nothing was run.
        """

    @abstractmethod
    def load_whole(self, folder: Path) -> None:
        """Continue from what any engine's `save` wrote on any number of ranks.

        Raises:
            ValueError: as `load`, or these ways of training cannot take over from each other.
        """

    def state_bytes(self) -> int:
        """About what `save` writes, over all ranks: float32 weights and AdamW's two moments."""
        weights = (whole_size(p) for p in trainable(self.model))
        return 12 * sum(weights)

    def _load_buffers(self, others: dict[str, Tensor]) -> None:
        for name, buffer in self.model.lm.named_buffers():
            if name in others:
                buffer.copy_(others[name])


def load_lm(config: Config, model_config: Any) -> Any:
    """The causal language model of the config, with adapters where it asks for them."""
    lm = load_model(
        config.model.path,
        model_config,
        dtype=config.model.dtype,
        attention=config.model.attention,
        seed=config.seed,
    )
    if config.model.kernels == "liger":
        use_liger(lm)
    if config.model.lora is not None:
        add_adapter(lm, config.model.lora, config.seed)
    return lm


def prepare_blocks(config: Config, lm: Any) -> BlockInputs | None:
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
            _say_separate(str(error))
    enable_checkpointing(lm)
    return None


def _say_separate(reason: str) -> None:
    if rank_said(os.environ) == 0:
        print(f"step.forward: separate, because {reason}", file=sys.stderr)


def make_optimizer(
    config: Config, parameters: list[torch.nn.Parameter], on_host: bool = True
) -> torch.optim.Optimizer:
    """AdamW with the config's settings.

    Args:
        on_host: its state lies in host memory; DeepSpeed has an AdamW of its own for that.

    Raises:
        ValueError: DeepSpeed's is asked for and cannot be compiled here.
    """
    o = config.optimizer
    settings: dict[str, Any] = {"lr": o.lr, "betas": o.betas, "eps": o.eps}
    settings["weight_decay"] = o.weight_decay
    if o.kind == "torch":  # which needs no compiler on the user's machine
        return torch.optim.AdamW(parameters, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    kind = DeepSpeedCPUAdam if on_host else FusedAdam
    try:
        optimizer: torch.optim.Optimizer = kind(parameters, **settings)
    except (RuntimeError, OSError, ImportError) as error:
        cause = next(iter(str(error.__cause__ or error).strip().splitlines()), "")
        raise ValueError(
            f"optimizer.kind deepspeed: {kind.__name__} cannot be compiled here ({cause}): install "
            f"a C++ compiler{'' if on_host else ' and the CUDA toolkit'} and ninja, or set "
            "optimizer.kind torch"
        ) from error
    return optimizer
