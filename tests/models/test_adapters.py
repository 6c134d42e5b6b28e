"""Adapters: what cannot be merged is refused; merged models are what was trained."""

from pathlib import Path

import pytest
import torch

from slap_ds.config.schema import LoraConfig
from slap_ds.models.lora import (
    add_adapter,
    check_merged,
    logits_of,
    merged,
    with_adapter,
)
from tests.models.test_reuse import small


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets) or None)


def test_an_adapter_on_tied_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match="adapts the input embedding, which this model uses as"):
        add_adapter(small(tie_word_embeddings=True), lora("embed_tokens", "q_proj"), 0)
    add_adapter(small(tie_word_embeddings=False), lora("embed_tokens", "q_proj"), 0)
    add_adapter(small(tie_word_embeddings=True), lora("q_proj"), 0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})],
)
def test_a_merged_model_gives_what_the_adapter_gave(
    kind: str, changes: dict[str, int], tmp_path: Path
) -> None:
    trained = small(kind, "sdpa", **changes)
    add_adapter(trained, lora(), 0)
    weights = {n: p.detach() for n, p in trained.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(p.shape, generator=generator) * 0.2 for n, p in weights.items()}
    model = with_adapter(small(kind, "sdpa", **changes), lora(), weights, None)
    wanted = logits_of(model)
    base = logits_of(small(kind, "sdpa", **changes))
    assert float((wanted - base).abs().mean()) > 0.01
    whole = merged(model)
    whole.save_pretrained(tmp_path)
    check_merged(tmp_path, wanted, torch.float32)
    with pytest.raises(ValueError, match="is not what was trained"):
        check_merged(tmp_path, base, torch.float32)
