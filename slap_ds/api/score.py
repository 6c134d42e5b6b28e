"""`slap_ds.score`: what a model says about the samples of a batch, without training them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from slap_ds.config.file import validated
from slap_ds.config.schema import ScoringConfig
from slap_ds.data.collated import samples_of
from slap_ds.data.packing import make_row
from slap_ds.data.samples import content_hash
from slap_ds.engine.hosted import HostedEngine
from slap_ds.scoring import Scorer, ScoringPlan
from slap_ds.selection import ScoredBatch

_SIGNALS = ("loss", "sketch", "el2n", "nuclear", "hidden")


def score(
    model: Any,
    batch: Mapping[str, Any],
    *,
    needs: tuple[str, ...] | list[str] = ("loss", "sketch"),
    unit: bool = True,
    seed: int = 0,
    **scoring: Any,
) -> ScoredBatch:
    """Score every sample of a batch on the model's current weights: one forward, no graph.

    The loss is a mean over a sample's trained tokens; the sketch is its gradient by the final
    hidden states over the Hessian's diagonal, both of the head and in closed form
    (docs/method.md). The diagonal is that of this batch alone.

    Args:
        model: a causal language model of transformers, or of peft around one, on one device.
        batch: what a collator gives: `input_ids` and `labels` (B, T) int64, the latter -100 where
            nothing is trained, with `attention_mask` (padding) or `position_ids` that begin anew
            with every sample (packed rows).
        needs: of loss, sketch, el2n, nuclear and hidden those that are wanted.
        unit: scale sketches to length 1, so that only directions differ.
        seed: of probes, projections and the tokens that the diagonal is the mean over.
        scoring: keys of the `scoring` section, such as sketch, curvature or chunk_tokens.

    Returns: N samples in reading order, those without trained tokens left out: `loss` (N,), nats
        per trained token; `sketch` (N, D); what else was wanted; `tokens` and `response_tokens`
        (N,); `ids` (N,), equal for equal samples. The model is as it was.

    Raises:
        ValueError: a batch without labels or samples, an unknown setting, or a model whose loss is
            not that of one linear head over its last hidden states.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    >>> ids = torch.arange(12).reshape(2, 6)
    >>> scored = score(model, {"input_ids": ids, "labels": ids})
    >>> scored.loss.shape, scored.sketch.shape, scored.response_tokens
    (torch.Size([2]), torch.Size([2, 16]), tensor([5, 5]))
    """
    if unknown := sorted(set(needs) - {*_SIGNALS}):
        raise ValueError(
            f"needs names {', '.join(unknown)}, expected some of {', '.join(_SIGNALS)}"
        )
    samples = samples_of(batch)
    if not samples:
        raise ValueError("the batch has no sample with a trained token: labels are all -100")
    settings = validated(ScoringConfig, scoring, "slap_ds.score").resolved(unit)
    scorer = Scorer(ScoringPlan(settings, frozenset(needs), seed))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    try:
        chunk = settings.chunk_on(device.type)
        with closing(HostedEngine(model, chunk_tokens=chunk, device=device)) as engine:
            # A row each: attentions differ in whether they keep a row's samples apart.
            sums = engine.score([make_row([sample]) for sample in samples], scorer.request(0))
    finally:
        for module, training in modes.items():
            module.training = training
    contents = [content_hash(s.ids, s.mask.astype("u1").tobytes()) for s in samples]
    ids = torch.tensor(contents)
    return replace(
        scorer.finish(sums, ids),
        ids=ids,
        tokens=torch.tensor([len(sample.ids) for sample in samples]),
        response_tokens=sums.tokens.cpu(),
    )
