"""The numbers of a model that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from slap_ds.config.schema import LoraConfig
from slap_ds.models.causal import block_parameters, count_parameters, trainable
from slap_ds.models.experts import active_parameters
from slap_ds.models.lora import add_adapter

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that memory and time depend on."""

    parameters: int
    active: int  # parameters that a token meets: fewer in a mixture of experts
    layers: int
    width: int  # E
    intermediate: int
    vocab: int  # V
    config: Any
    trained: int | None = None  # parameters of an adapter beside frozen weights; None: all of them

    @classmethod
    def of(cls, model_config: Any, lora: LoraConfig | None = None) -> Shape:
        """From a transformers config; parameters are counted on a meta model."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        parameters, active = count_parameters(model), active_parameters(model)
        if lora is not None:
            add_adapter(model, lora, seed=0)
        text = model_config.get_text_config()
        return cls(
            parameters=parameters,
            active=active,
            trained=sum(p.numel() for p in trainable(model)) if lora is not None else None,
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
            vocab=text.vocab_size,
            config=model_config,
        )

    @property
    def block(self) -> float:
        """Parameters of one block."""
        return block_parameters(self.config, self.parameters) / self.layers

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head."""
        return bool(getattr(self.config, "tie_word_embeddings", False))
