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
import itertools
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slap_ds.builds import refuse_stale_locks
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
from slap_ds.peers import Heart
from slap_ds.scoring import HeadScores, Scores, Tail, Wants, collect, tail_parameters
from slap_ds.tensor_files import TensorWriter, read_tensors
from slap_ds.watchdog import Watchdog
from slap_ds.whole_state import Key, WholeState, open_whole

MOMENTS: tuple[Key, Key] = ("exp_avg", "exp_avg_sq")

# How much longer torch waits than the watchdog, seconds.
_MARGIN_S = 3.0


class RankError(RuntimeError):
    """A mistake or fault that this rank has seen and others perhaps not, so this one reports it."""


class PortTaken(RankError):
    """Rank 0 cannot listen; on another port, or later, it may."""


@dataclass(frozen=True)
class TrainStats:
    """One optimizer step, this rank's part; the trainer sums over ranks."""

    loss: float  # nats: weighted sum over this rank's trained tokens
    grad_norm: float  # before clipping, of the whole model
    seconds: dict[str, float]  # forward_s, backward_s, optimizer_s
    boundary_bytes: int = 0  # forward reuse: block inputs this rank held at once
    # Positions in the candidate batch of samples in rows whose loss is NaN or infinite.
    broken: tuple[int, ...] = ()


class Engine(ABC):
    """The part both engines share: the loops over rows."""

    kind: str  # engine.kind
    model: PackedCausalLM  # the wrapper, not the DeepSpeed engine
    optimizer: Any
    device: torch.device
    hidden_size: int
    parameters: int
    heart: Heart = Heart()  # of a rank that nobody waits for

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
                self.heart.beat("scoring a row")
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
        losses: list[Tensor] = []
        for i, row in enumerate(rows):
            self.heart.beat("training a row")
            with watch("forward"):
                part = self._forward(row.to(self.device), "train", None)
            losses.append(part.detach().double())
            with watch("backward"):
                self._backward(part, total_weight, last=i == len(rows) - 1)
        self.heart.beat("optimizer step")
        with watch("optimizer"):
            grad_norm = self._step()
        boundary_bytes = 0
        if replay:
            boundary_bytes = self._inputs().peak_bytes
            self._inputs().stop()
        each = torch.stack(losses).tolist()
        bad = [row.where for row, loss in zip(rows, each, strict=True) if not math.isfinite(loss)]
        broken = tuple(itertools.chain.from_iterable(bad))
        return TrainStats(
            math.fsum(each) if not bad else math.nan,
            grad_norm,
            watch.seconds(),
            boundary_bytes,
            broken,
        )

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
        weights = (getattr(p, "ds_numel", p.numel()) for p in trainable(self.model))
        return 12 * sum(weights)

    def _load_buffers(self, others: dict[str, Tensor]) -> None:
        for name, buffer in self.model.lm.named_buffers():
            if name in others:
                buffer.copy_(others[name])


class TorchEngine(Engine):
    """One process, plain PyTorch: the reference that the DeepSpeed engine is tested against."""

    kind = "torch"

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
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm) if finite else math.inf

    def save(self, folder: Path, writer: TensorWriter) -> None:
        model = self.model.lm.state_dict()
        # Frozen weights are where they were loaded from.
        for name, parameter in self.model.lm.named_parameters():
            if not parameter.requires_grad:
                del model[name]
        names = [name for name, p in self.model.lm.named_parameters() if p.requires_grad]
        state = {"model": model, "optimizer": self.optimizer.state_dict(), "names": names}
        writer.write(state, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        state = read_tensors(folder / "torch.pt")
        problem = self.model.lm.load_state_dict(state["model"], strict=False)
        trained = {name for name, p in self.model.lm.named_parameters() if p.requires_grad}
        assert not problem.unexpected_keys, problem
        assert not trained & set(problem.missing_keys), problem
        self.optimizer.load_state_dict(state["optimizer"])

    def load_whole(self, folder: Path) -> None:
        whole = open_whole(folder)
        with torch.no_grad():
            self._load_buffers(whole.others)
            for name, parameter in self.model.lm.named_parameters():
                if not parameter.requires_grad:
                    continue
                parameter.copy_(whole.tensor(name, "fp32"))
                state: dict[str, Tensor] = {"step": torch.tensor(whole.step)}
                state |= {key: whole.tensor(name, key).to(parameter) for key in MOMENTS}
                self.optimizer.state[parameter] = state


class DeepSpeedEngine(Engine):
    """DeepSpeed, ZeRO 0 to 3."""

    kind = "deepspeed"

    def __init__(self, config: Config, model_config: Any, comm: Comm) -> None:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.hidden_size = model_config.get_text_config().hidden_size
        settings = resolve_deepspeed(config, comm.world, self.hidden_size)
        if settings["zero_optimization"].get("stage") == 3:
            # transformers looks for a living config object and then partitions while loading;
            # zero.Init around from_config fails.
            self._partitioner = HfDeepSpeedConfig(settings)
        if settings.get("bf16", {}).get("enabled"):
            settings["bf16"].setdefault("check_grad_overflow", True)
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
        self.rank, self.world = comm.rank, comm.world
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=_optimizer(config, trainable(lm)),
            config=settings,
        )
        limit_waiting(config.engine.start_timeout_s)
        self.heart = comm.heart
        # A script that unpickles without limits, copied into every checkpoint; `slap-ds export`
        # does its work.
        self.engine._copy_recovery_script = lambda save_path: None
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
        # ZeRO 1 to 3 skip such a step themselves. Without ZeRO every rank holds all gradients.
        if self.settings["zero_optimization"].get("stage", 0) == 0:
            gradients = [p.grad for p in trainable(self.model) if p.grad is not None]
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                self.engine.optimizer.zero_grad()
                return math.inf
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def save(self, folder: Path, writer: TensorWriter) -> None:
        self.engine.checkpoint_engine = _tensor_files(writer)
        # Frozen weights are where they were loaded from.
        self.engine.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=self.adapts
        )

    def load(self, folder: Path) -> None:
        self.engine.checkpoint_engine = _tensor_files(TensorWriter())
        self.engine.load_checkpoint(str(folder), tag="engine", load_module_strict=not self.adapts)

    def load_whole(self, folder: Path) -> None:
        stage = int(self.settings["zero_optimization"].get("stage", 0))
        if stage == 0:
            raise ValueError(
                "checkpoint.reshard works with ZeRO 1 to 3 and with engine.kind torch: resume with "
                "as many ranks as saved"
            )
        whole = open_whole(folder)
        names = {p: n.removeprefix("lm.") for p, n in self.engine.param_names.items()}
        optimizer = self.engine.optimizer
        with torch.no_grad():
            self._load_buffers(whole.others)
            if stage == 3:
                self._load_partitions(whole, names)
            else:
                from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

                for flat in optimizer.single_partition_of_fp32_groups:
                    made: dict[str, Tensor] = {"step": torch.tensor(whole.step)}
                    made |= {key: torch.zeros_like(flat) for key in MOMENTS}
                    optimizer.optimizer.state[flat] = made
                optimizer._lazy_init_hp_params_optimizer_state()
                for parameter in trainable(self.model):
                    name = names[parameter]
                    value = whole.tensor(name, "fp32").to(self.device)
                    safe_set_full_fp32_param(parameter, value)
                    for key in MOMENTS:
                        value = whole.tensor(name, key).to(self.device)
                        safe_set_full_optimizer_state(parameter, value, key)
                optimizer.update_lp_params()
        self.engine.global_steps = int(whole.step)

    def _load_partitions(self, whole: WholeState, names: dict[Any, str]) -> None:
        """ZeRO-3: write this rank's part of the state as its own checkpoint would hold it, and let
        DeepSpeed load that."""
        optimizer = self.engine.optimizer
        optimizer.checkpoint_event_prologue()
        state = optimizer.state_dict()
        flats: dict[Key, list[Tensor]] = {key: [] for key in ("fp32", *MOMENTS)}
        for group, flat in zip(
            optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            for key, made in flats.items():
                made.append(torch.zeros_like(flat))
                offset = 0
                for parameter in group:
                    size = parameter.ds_tensor.ds_numel
                    value = whole.tensor(names[parameter], key).flatten()
                    part = value[self.rank * size : (self.rank + 1) * size]
                    made[-1][offset : offset + len(part)].copy_(part)
                    offset += size
        state["fp32_flat_groups"] = flats["fp32"]
        moments: dict[int, dict[str, Tensor]] = {}
        for i in range(len(flats["fp32"])):
            moments[i] = {"step": torch.tensor(whole.step)}
            moments[i] |= {key: flats[key][i] for key in MOMENTS}
        state["optimizer_state_dict"]["state"] = moments
        optimizer.load_state_dict([None] * self.rank + [state])
        optimizer.checkpoint_event_epilogue()


def start_ranks(config: Config, dog: Watchdog | None = None) -> Comm:
    """Join the process group the launcher set up (`launch_env` knows which); alone: one rank.

    Args:
        dog: is told of the other ranks, and ends this one if they leave it waiting.

    Raises:
        ValueError: several ranks with the one-process engine; a launcher's variables are wrong;
            the master port is taken; a killed build left a lock.
    """
    place = discover(os.environ)
    heart = Heart() if dog is None else dog.heart
    if config.engine.kind == "torch":
        if place.world > 1:
            raise ValueError(
                f"engine.kind torch runs on one rank, the launcher started {place.world}"
            )
        return Comm(heart=heart)
    if place.world > 1:
        heart.limit_s = config.engine.start_timeout_s
    heart.beat("looking for locks of builds")
    refuse_stale_locks(os.environ)
    import deepspeed

    os.environ.update(place.variables())
    heart.beat("joining the ranks")
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    waiting = datetime.timedelta(seconds=config.engine.start_timeout_s + _MARGIN_S)
    try:
        deepspeed.init_distributed(timeout=waiting, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortTaken(
            f"MASTER_PORT {place.port} is taken on {place.address}: another run, or one that has "
            "not ended yet; choose another port"
        ) from error
    backend = dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else "cpu"
    comm = Comm(dist.get_rank(), dist.get_world_size(), torch.device(device), heart=heart)
    if comm.world > 1:
        comm.watch(os.environ["MASTER_ADDR"])
    if dog is not None:
        comm.peers.folder = dog.folder
        dog.peers = comm.peers
    return comm


def limit_waiting(seconds: float) -> None:
    """Let no process group wait longer; those DeepSpeed makes have torch's 10 or 30 minutes.

    A little longer than the watchdog waits: it can say who is missing, torch's own cannot.
    """
    seconds += _MARGIN_S
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_rank(group) >= 0:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def stop_ranks(comm: Comm, code: int = 0) -> None:
    """End a finished run: with several ranks all processes exit here, together, with this status.

    Not through the interpreter's own exit: a thread of the communication libraries that wakes up
    while it is torn down aborts the process now and then ("terminate called without an active
    exception"), and the launcher takes the finished run for a failed one.
    """
    if comm.world > 1:
        comm.barrier(-1, "the end of the run")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def make_engine(config: Config, model_config: Any, comm: Comm) -> Engine:
    if config.engine.kind == "torch":
        return TorchEngine(config, model_config)
    return DeepSpeedEngine(config, model_config, comm)


def _tensor_files(writer: TensorWriter) -> Any:
    """What DeepSpeed saves and loads its files with: hashed, and never unpickled freely."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class TensorFiles(CheckpointEngine):  # type: ignore[misc]
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            writer.write(state_dict, Path(path))

        def load(self, path: str, map_location: Any = None) -> Any:
            return read_tensors(Path(path), [ZeroStageEnum, LossScaler, fragment_address])

        def commit(self, info: Any) -> bool:
            return True

    return TensorFiles()


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


@contextlib.contextmanager
def logged_collectives() -> Iterator[dict[str, tuple[int, int]]]:
    """Count DeepSpeed's own collectives; after the block: {operation: (calls, bytes)}, this rank's.

    Every one of them is timed meanwhile, so that steps take longer.
    """
    found: dict[str, tuple[int, int]] = {}
    if not dist.is_initialized():
        yield found
        return
    from deepspeed import comm as ds_comm

    log: Any = ds_comm.comm.comms_logger
    ds_comm.configure(enabled=True, prof_all=True, verbose=False)
    log.comms_dict.clear()
    try:
        yield found
    finally:
        ds_comm.configure(enabled=False)
    for operation, by_size in log.comms_dict.items():
        calls = sum(int(entry[0]) for entry in by_size.values())
        found[operation] = calls, sum(int(size) * int(e[0]) for size, e in by_size.items())


def build_extensions() -> None:
    """Compile what DeepSpeed needs on this accelerator, once, before several ranks want it."""
    if not torch.cuda.is_available():
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)
