"""DeepSpeed, ZeRO stages 0 to 3."""

from __future__ import annotations

import contextlib
import copyreg
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slap_ds.compat import (
    another_state,
    attach_moments,
    copy_to_weights,
    gathered_along,
    keep_files_with,
    part_size,
    partitioned_groups,
    second_order,
    set_step,
    spare_compiling,
    stay_gathered,
    weight_names,
    without_recovery_script,
)
from slap_ds.config.deepspeed import resolve_deepspeed
from slap_ds.config.schema import Config
from slap_ds.data.packing import PackedRow
from slap_ds.distributed.comm import Comm
from slap_ds.distributed.startup import first_on_each_node
from slap_ds.engine.base import MOMENTS, Engine, TrainStats, load_lm, make_optimizer, prepare_blocks
from slap_ds.engine.process_group import limit_waiting, split_rows
from slap_ds.engine.tensor_files import TensorWriter, read_tensors
from slap_ds.engine.whole_state import Key, WholeState, open_whole
from slap_ds.models.blocks import find_blocks
from slap_ds.models.causal import PackedCausalLM, count_parameters, trainable
from slap_ds.models.experts import RouterBalance, active_parameters
from slap_ds.scoring import ScoreRequest, Scores


class DeepSpeedEngine(Engine):
    """DeepSpeed, ZeRO 0 to 3."""

    kind = "deepspeed"

    def __init__(self, config: Config, model_config: Any, comm: Comm) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.config import DeepSpeedConfigError
        from transformers.integrations import HfDeepSpeedConfig

        self.hidden_size = model_config.get_text_config().hidden_size
        settings = resolve_deepspeed(config, comm.world, self.hidden_size)
        try:
            deepspeed.DeepSpeedConfig(settings)
        except (ValueError, AssertionError, DeepSpeedConfigError) as error:
            # pydantic's own form: one line for what is wrong, then an address.
            told = " ".join(str(error).split("For further")[0].split()) or type(error).__name__
            raise ValueError(
                f"engine.deepspeed: DeepSpeed refuses these settings: {told}"
            ) from None
        if settings["zero_optimization"].get("stage") == 3:
            # transformers looks for a living config object and then partitions while loading;
            # zero.Init around from_config fails.
            self._partitioner = HfDeepSpeedConfig(settings)
        if settings.get("bf16", {}).get("enabled"):
            settings["bf16"].setdefault("check_grad_overflow", True)
        lm = load_lm(config, model_config)
        inputs = prepare_blocks(config, lm)
        self.partitioned = settings["zero_optimization"].get("stage") == 3
        lora = config.model.lora
        self.adapts = lora is not None
        self.optimizer_kind = config.optimizer.kind
        if self.partitioned and (config.model.gradient_checkpointing or (lora and lora.use_dora)):
            # One gather a block, by hooks on the block itself; DoRA reads a layer's weight outside
            # that layer. A model without one list of blocks runs with finer hooks, without replay.
            with contextlib.suppress(ValueError):
                kinds = {type(block) for block in find_blocks(lm)}
                deepspeed.utils.set_z3_leaf_modules(lm, list(kinds))
        if self.partitioned and inputs is not None:
            inputs.held = stay_gathered
        chunk = config.scoring.chunk_on(get_accelerator().device_name())
        self.model = PackedCausalLM(lm, chunk, inputs)
        self.model.balance = RouterBalance.of(lm)
        self.model.split = split_rows(comm)
        self.parameters, self.active_parameters = count_parameters(lm), active_parameters(lm)
        offload = settings["zero_optimization"].get("offload_optimizer") or {}
        on_host = get_accelerator().device_name() == "cpu" or offload.get("device") == "cpu"
        self.rank, self.world = comm.rank, comm.world
        spare_compiling(deepspeed)
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            # DeepSpeed's is compiled when it is first made: once a node.
            optimizer=first_on_each_node(
                comm, "the optimizer", lambda tell: make_optimizer(config, trainable(lm), on_host)
            ),
            config=settings,
        )
        limit_waiting(config.engine.start_timeout_s)
        self.heart = comm.heart
        # A script that unpickles without limits, copied into every checkpoint; `slap-ds export`
        # does its work.
        without_recovery_script(self.engine)
        self.engine.train()
        self.optimizer = self.engine.optimizer
        self.device = torch.device(self.engine.device)
        self.settings = settings
        self._traced = False
        self._replays = second_order(self.optimizer) if self.partitioned else None
        self._answers = second_order(self.optimizer) if self.partitioned else None
        self.forwards_together = self.partitioned and comm.world > 1

    def score(self, rows: Sequence[PackedRow], request: ScoreRequest, keep: bool = False) -> Scores:
        if self.partitioned and not self._traced:
            self._record_trace()
        return super().score(rows, request, keep)

    def train(
        self, rows: Sequence[PackedRow], total_weight: float, lr: float, replay: bool = False
    ) -> TrainStats:
        self._traced = True
        with self._order_of_modules(replay):
            return super().train(rows, total_weight, lr, replay)

    def _order_of_modules(self, replay: bool) -> AbstractContextManager[None]:
        """Replayed rows skip the forward of every block: ZeRO-3 prefetches them along an order of
        their own, and that of scored and trained rows stays valid."""
        if not replay or self._replays is None:
            return nullcontext()
        return gathered_along(self.optimizer, self._replays)

    def _order_of_answers(self) -> AbstractContextManager[None]:
        """The tokens of an answer pass the modules so often that no order is kept of it."""
        return (
            nullcontext()
            if self._answers is None
            else gathered_along(self.optimizer, self._answers)
        )

    def _record_trace(self) -> None:
        """Run an empty row forward and backward before the first scoring.

        ZeRO-3 prefetches along the order of modules that it saw first. A forward without backward
        is the beginning of a training row's order and leaves it valid; the other way round it is
        thrown away and recorded anew at every step. The row adds zeros to the gradients.
        """
        self._traced = True
        loss = self._forward(self._part(PackedRow.empty()), "train", None)
        self._backward(loss, 1.0, last=False)

    def _whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        if self.settings["zero_optimization"].get("stage") != 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        gathered: AbstractContextManager[Any] = GatheredParameters(parameters)
        return gathered

    def _head_kept(self) -> AbstractContextManager[Any]:
        if not self.partitioned:
            return nullcontext()
        return stay_gathered(self.model.lm.get_output_embeddings())

    def _forward(self, row: PackedRow, mode: str, request: ScoreRequest | None) -> Any:
        return self.engine(row, mode, request)

    def _backward(self, loss: Tensor, total_weight: float, last: bool) -> None:
        # DeepSpeed averages gradients over ranks; the loss is a sum over all of them, parts of rows
        # that ranks share included.
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
        # Frozen weights are where they were loaded from; a tied one has a second name, which
        # DeepSpeed would keep.
        named = self.model.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in named if not p.requires_grad} if self.adapts else set()
        keep_files_with(self.engine, tensor_files(writer, frozen))
        self.engine.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=self.adapts
        )

    def load(self, folder: Path) -> None:
        keep_files_with(self.engine, tensor_files(TensorWriter()))
        self.engine.load_checkpoint(str(folder), tag="engine", load_module_strict=not self.adapts)

    def load_whole(self, folder: Path) -> None:
        stage = int(self.settings["zero_optimization"].get("stage", 0))
        if stage == 0:
            raise ValueError(
                "checkpoint.reshard works with ZeRO 1 to 3 and with engine.kind torch: resume with "
                "as many ranks as saved"
            )
        whole = open_whole(folder)
        names = {p: n.removeprefix("lm.") for p, n in weight_names(self.engine).items()}
        optimizer = self.engine.optimizer
        with torch.no_grad():
            self._load_buffers(whole.others)
            if stage == 3:
                with another_state(optimizer):
                    self._load_partitions(whole, names)
            else:
                from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

                for group in optimizer.optimizer.param_groups:
                    (flat,) = group["params"]  # this rank's part of the group
                    made: dict[str, Any] = {"step": self._step_count(whole)}
                    made |= {key: torch.zeros_like(flat) for key in MOMENTS}
                    optimizer.optimizer.state[flat] = made
                attach_moments(optimizer)
                for parameter in trainable(self.model):
                    name = names[parameter]
                    value = whole.tensor(name, "fp32").to(self.device)
                    safe_set_full_fp32_param(parameter, value)
                    for key in MOMENTS:
                        value = whole.tensor(name, key).to(self.device)
                        safe_set_full_optimizer_state(parameter, value, key)
                copy_to_weights(optimizer)
        set_step(self.engine, int(whole.step))

    def _step_count(self, whole: WholeState) -> Tensor | int:
        """Steps taken, as this run's optimizer keeps them."""
        return int(whole.step) if self.optimizer_kind == "deepspeed" else torch.tensor(whole.step)

    def _load_partitions(self, whole: WholeState, names: dict[Any, str]) -> None:
        """ZeRO-3: write this rank's part of the state as its own checkpoint would hold it, and let
        DeepSpeed load that."""
        optimizer = self.engine.optimizer
        state = optimizer.state_dict()
        flats: dict[Key, list[Tensor]] = {key: [] for key in ("fp32", *MOMENTS)}
        for group, flat in partitioned_groups(optimizer):
            for key, made in flats.items():
                made.append(torch.zeros_like(flat))
                offset = 0
                for parameter in group:
                    size = part_size(parameter)
                    value = whole.tensor(names[parameter], key).flatten()
                    part = value[self.rank * size : (self.rank + 1) * size]
                    made[-1][offset : offset + len(part)].copy_(part)
                    offset += size
        state["fp32_flat_groups"] = flats["fp32"]
        moments: dict[int, dict[str, Any]] = {}
        for i in range(len(flats["fp32"])):
            moments[i] = {"step": self._step_count(whole)}
            moments[i] |= {key: flats[key][i] for key in MOMENTS}
        state["optimizer_state_dict"]["state"] = moments
        optimizer.load_state_dict([None] * self.rank + [state])


def tensor_files(writer: TensorWriter, left_out: Collection[str] = ()) -> Any:
    """What DeepSpeed saves and loads its files with: hashed, and never unpickled freely; without
    the weights of the names `left_out`."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Python 3.11.0 to 3.11.3 pickle a member of an enum as a call of getattr, which no reader of
    # ours allows: by its value instead, on every version.
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))

    class TensorFiles(CheckpointEngine):  # type: ignore[misc]
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            if left_out and "module" in state_dict:
                weights = state_dict["module"].items()
                kept = {name: value for name, value in weights if name not in left_out}
                state_dict = {**state_dict, "module": kept}
            writer.write(state_dict, Path(path))

        def load(self, path: str, map_location: Any = None) -> Any:
            return read_tensors(Path(path), [ZeroStageEnum, LossScaler, fragment_address])

        def commit(self, info: Any) -> bool:
            return True

    return TensorFiles()
