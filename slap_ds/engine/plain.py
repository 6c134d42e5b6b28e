"""One process, plain PyTorch: for tests, small models and debugging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slap_ds.config.schema import Config
from slap_ds.data.packing import PackedRow
from slap_ds.engine.base import MOMENTS, Engine, load_lm, make_optimizer, prepare_blocks
from slap_ds.engine.tensor_files import TensorWriter, read_tensors
from slap_ds.engine.whole_state import open_whole
from slap_ds.models.causal import PackedCausalLM, count_parameters, trainable
from slap_ds.models.experts import RouterBalance, active_parameters
from slap_ds.scoring import ScoreRequest


class TorchEngine(Engine):
    """One process, plain PyTorch: the reference that the DeepSpeed engine is tested against."""

    kind = "torch"

    def __init__(self, config: Config, model_config: Any) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lm = load_lm(config, model_config).to(self.device)
        inputs = prepare_blocks(config, lm)
        chunk = config.scoring.chunk_on(self.device.type)
        self.model = PackedCausalLM(lm, chunk, inputs).train()
        self.model.balance = RouterBalance.of(lm)
        self.hidden_size = model_config.get_text_config().hidden_size
        self.parameters, self.active_parameters = count_parameters(lm), active_parameters(lm)
        self.config = config

    @cached_property
    def masters(self) -> list[nn.Parameter]:
        """What the optimizer steps, in the order of `trainable`: the weights themselves, or float32
        copies of bfloat16 ones, in which most steps would be too small to count.

        Made when they are first needed: evaluation has no use for them.
        """
        return [
            p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float())
            for p in trainable(self.model)
        ]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over `masters`."""
        return make_optimizer(self.config, self.masters)

    def _forward(self, row: PackedRow, mode: str, request: ScoreRequest | None) -> Any:
        return self.model(row, mode, request)

    def _backward(self, loss: Tensor, total_weight: float, last: bool) -> None:
        (loss / total_weight).backward()

    def _step(self) -> float:
        for parameter, master in self._copies():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        limit = self.config.optimizer.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, limit))
        if math.isfinite(norm):
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in self._copies():
                    parameter.copy_(master)
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return norm if math.isfinite(norm) else math.inf

    def _copies(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(weight, its float32 master) where those are two."""
        pairs = zip(trainable(self.model), self.masters, strict=True)
        return ((weight, master) for weight, master in pairs if weight is not master)

    def _names(self) -> list[str]:
        """transformers' names of the trained weights, in the order of `trainable`."""
        return [name for name, p in self.model.lm.named_parameters() if p.requires_grad]

    def _named_masters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By every name: a tied weight has two."""
        master_of = dict(zip(trainable(self.model), self.masters, strict=True))
        for name, parameter in self.model.lm.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                yield name, master_of[parameter]

    def save(self, folder: Path, writer: TensorWriter) -> None:
        # Frozen weights are where they were loaded from.
        lm = self.model.lm
        named = lm.named_parameters(remove_duplicate=False)  # a tied weight has two names
        frozen = {n for n, p in named if not p.requires_grad}
        model = {n: v for n, v in self.model.lm.state_dict().items() if n not in frozen}
        model |= {name: master.detach() for name, master in self._named_masters()}
        state = {"model": model, "optimizer": self.optimizer.state_dict(), "names": self._names()}
        writer.write(state, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        state = read_tensors(folder / "torch.pt")
        problem = self.model.lm.load_state_dict(state["model"], strict=False)
        assert not problem.unexpected_keys, problem
        assert not set(self._names()) & set(problem.missing_keys), problem
        with torch.no_grad():
            for name, master in self._named_masters():
                master.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def load_whole(self, folder: Path) -> None:
        whole = open_whole(folder)
        weights = trainable(self.model)
        with torch.no_grad():
            self._load_buffers(whole.others)
            for name, parameter, master in zip(self._names(), weights, self.masters, strict=True):
                master.copy_(whole.tensor(name, "fp32"))
                parameter.copy_(master)
                state: dict[str, Tensor] = {"step": torch.tensor(whole.step)}
                state |= {key: whole.tensor(name, key).to(master) for key in MOMENTS}
                self.optimizer.state[master] = state
