"""The mixin: a Trainer's batches are the candidates, and it trains the picks.

    get_batch_samples   all micro-batches of an optimizer step -> score, choose -> the picks
    training_step       one micro-batch of picks: forward and backward, by the Trainer's own means
    log, on_save        what selection has to say, and its state beside the Trainer's

Data loading, wrapping, optimizer, schedule, clipping, evaluation and checkpoints are the Trainer's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from slap_ds.compat import attention_of, no_checkpointing_by_transformers
from slap_ds.config.file import validated
from slap_ds.config.schema import ScoringConfig, SelectionConfig, StepConfig
from slap_ds.data.packing import PackedRow
from slap_ds.engine import joined_ranks
from slap_ds.engine.hosted import HostedEngine, language_model
from slap_ds.engine.tensor_files import TensorWriter, read_tensors
from slap_ds.hf_trainer.checks import check_trainer, checkpoints
from slap_ds.hf_trainer.step import Chooser, Chosen, Settings
from slap_ds.models.reuse import BlockInputs, install
from slap_ds.selection import make_selector
from slap_ds.train.checks import check_head, check_isolation, check_reuse

logger = logging.getLogger(__name__)
STATE = "slap_state.pt"  # in each of the Trainer's checkpoints
_ROW = "slap_row"  # in a batch of picks


class SlapTrainerMixin:
    """Put before a Trainer in a class's bases; `selection`, `scoring` and `step` are the sections
    of a run file with these names (`slap-ds settings`), `seed` is that of the arguments.

    The candidate batch of a step is what the Trainer would train: per_device_train_batch_size *
    gradient_accumulation_steps * ranks. The picks stay where they are. Their loss is the weighted
    token mean over all ranks and micro-batches, as the Trainer's own is without weights.

    Attributes:
        chosen: what the last step trained; None before the first.

    Raises:
        ValueError: at `train()`: settings that do not go together, a model that cannot be trained
            on packed rows. See docs/trainers.md.
    """

    model: Any
    args: Any
    accelerator: Any
    state: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        selection: Mapping[str, Any] | None = None,
        scoring: Mapping[str, Any] | None = None,
        step: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*args, **named)
        self.slap = Settings(
            selection=validated(SelectionConfig, selection or {}, "selection"),
            scoring=validated(ScoringConfig, scoring or {}, "scoring"),
            step=validated(StepConfig, step or {}, "step"),
            seed=self.args.seed,
        )
        self.chosen: Chosen | None = None
        self._slap_engine: HostedEngine | None = None
        self._chooser: Chooser | None = None
        self._resumes: Path | None = None
        self._told: list[dict[str, float]] = []  # of the steps since the last log
        self.add_callback(_SaveState(self))  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: str | bool | None = None, **named: Any) -> Any:
        """As the Trainer's."""
        selection = self.slap.selection
        selector = make_selector(selection.model_dump())
        check_trainer(self, selection.method, selector, self.slap.step)
        engine = self._host()
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(self.args.output_dir)
        self._resumes = Path(found) if isinstance(found, str) else None
        self._chooser = None
        engine.model.take_head()
        try:
            return super().train(resume_from_checkpoint, **named)  # type: ignore[misc]
        finally:
            engine.forget_rows()
            engine.model.give_head_back()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The picks of the candidates that the Trainer would have trained, in as many batches."""
        batches, items = super().get_batch_samples(  # type: ignore[misc]
            epoch_iterator, num_batches, device
        )
        if not batches:
            return batches, items
        chooser = self._ready()
        lr = float(self.lr_scheduler.get_last_lr()[0])
        self.chosen = chosen = chooser.choose(self.state.global_step, batches, lr)
        self._told.append(_said(chosen))
        rows = [{"input_ids": row.input_ids, _ROW: _Held(row)} for row in chosen.rows]
        return rows, torch.tensor(chosen.total_weight, device=device)

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch of picks."""
        if _ROW not in inputs:
            loss: torch.Tensor = super().training_step(  # type: ignore[misc]
                model, inputs, *rest, **named
            )
            return loss
        assert self._slap_engine is not None
        assert self.chosen is not None
        model.train()
        optimizer = self.optimizer  # type: ignore[attr-defined]
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        # The ranks' gradients are averaged; the loss is a sum over all of them.
        factor = self.accelerator.num_processes / self.chosen.total_weight
        scale = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}  # type: ignore[attr-defined]
        return self._slap_engine.train_row(
            inputs[_ROW].row, factor, lambda loss: self.accelerator.backward(loss, **scale)
        ).to(self.args.device)

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """With the means since the last log: candidates, picked, candidate_loss."""
        if self._told and "loss" in logs:
            for name in self._told[-1]:
                values = [told[name] for told in self._told if name in told]
                logs[name] = sum(values) / len(values)
            self._told = []
        super().log(logs, *rest, **named)  # type: ignore[misc]

    def _host(self) -> HostedEngine:
        """Our forward inside the model, once; before anybody wraps it."""
        if self._slap_engine is not None:
            return self._slap_engine
        lm = language_model(self.model)
        inputs = self._boundary(lm)
        embedding = lm.get_input_embeddings().weight
        if inputs is not None and not embedding.requires_grad:
            lm.enable_input_require_grads()  # else the backward would end at the first block
        device = self.args.device
        self._slap_engine = HostedEngine(
            self.model,
            chunk_tokens=self.slap.scoring.chunk_on(device.type),
            device=device,
            block_inputs=inputs,
        )
        if self._partitions():
            self._slap_engine.partition()
        handler = self.accelerator.ddp_handler
        if handler is not None:
            # Blocks that are replayed are not in the graph that it would search for unused weights.
            handler.find_unused_parameters = False
        return self._slap_engine

    def _boundary(self, lm: Any) -> BlockInputs | None:
        step = self.slap.step
        needs = make_selector(self.slap.selection.model_dump()).needs
        if step.forward == "separate" or not checkpoints(self.args) or not needs:
            return None
        try:
            return install(lm, on_host=step.boundaries == "host")
        except ValueError as error:
            if step.forward == "reuse":
                raise
            logger.warning("step.forward: separate, because %s", error)
            return None

    def _partitions(self) -> bool:
        """Whether weights are partitioned: ZeRO-3."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and plugin.zero_stage == 3

    def _ready(self) -> Chooser:
        """The state of selection; made, and checked, where the first step of a run is taken."""
        if self._chooser is not None:
            return self._chooser
        engine = self._slap_engine
        assert engine is not None
        engine.wrap(self.model_wrapped, self._partitions())  # type: ignore[attr-defined]
        lm = engine.model.lm
        forward = self.slap.step.forward
        if engine.can_reuse:
            no_checkpointing_by_transformers(lm)  # the boundary of the blocks is ours
        check_isolation(engine, lm.config, attention_of(lm.config) or "")
        check_head(engine, lm.config, "float32" if self._computes_in_float32() else "bfloat16")
        check_reuse(engine, forward)
        chooser = Chooser(self.slap, engine, joined_ranks(), self.state.max_steps)
        if self._resumes is not None:
            if (file := self._resumes / STATE).exists():
                chooser.load_state_dict(read_tensors(file))
            else:
                logger.warning("%s is not there: selection starts afresh", file)
        self._chooser = chooser
        return chooser

    def _computes_in_float32(self) -> bool:
        weight = next(self.model.parameters())
        return weight.dtype == torch.float32 and not self.args.bf16


class _Held:
    """A row on its way through the Trainer, which would take a tuple apart."""

    def __init__(self, row: PackedRow) -> None:
        self.row = row


class _SaveState(TrainerCallback):  # type: ignore[misc]
    """Puts the state of selection into each of the Trainer's checkpoints."""

    def __init__(self, trainer: SlapTrainerMixin) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        chooser = self.trainer._chooser
        if chooser is None or not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        writer = TensorWriter()
        writer.write(chooser.state_dict(), folder / STATE)
        writer.finish()


def _said(chosen: Chosen) -> dict[str, float]:
    said = {"candidates": float(chosen.candidates), "picked": float(len(chosen.selection.picks))}
    if chosen.scored is not None:
        said["candidate_loss"] = float(chosen.scored.loss.double().nanmean())
    return said
