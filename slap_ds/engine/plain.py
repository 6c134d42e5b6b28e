"""One process, plain PyTorch: for tests, small models and debugging."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slap_ds.config import Config
from slap_ds.data.packing import PackedRow
from slap_ds.engine.base import MOMENTS, Engine, load_lm, make_optimizer, prepare_blocks
from slap_ds.models.causal import (
    PackedCausalLM,
    count_parameters,
    trainable,
)
from slap_ds.scoring import Wants
from slap_ds.tensor_files import TensorWriter, read_tensors
from slap_ds.whole_state import open_whole


class TorchEngine(Engine):
    """One process, plain PyTorch: the reference that the DeepSpeed engine is tested against."""

    kind = "torch"

    def __init__(self, config: Config, model_config: Any) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lm = load_lm(config, model_config).to(self.device)
        inputs = prepare_blocks(config, lm)
        self.model = PackedCausalLM(lm, config.scoring.chunk_tokens, inputs).train()
        self.hidden_size = model_config.get_text_config().hidden_size
        self.parameters = count_parameters(lm)
        self.optimizer = make_optimizer(config, trainable(lm))
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
