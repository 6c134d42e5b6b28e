"""What is checked of a model before the first step."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from slap_ds.data.packing import Candidate, make_row
from slap_ds.engine import ScoringEngine
from slap_ds.launch.environment import ranks_said
from slap_ds.models.reuse import host_boundary_bytes
from slap_ds.models.split import ALONE
from slap_ds.scoring import ScoreRequest

if TYPE_CHECKING:
    from slap_ds.train.run import Run


def check_sharing(engine: ScoringEngine, model_config: Any, dtype: str) -> None:
    """Refuse ranks that share rows of a model in which more than attention looks at other tokens.

    What an architecture has of that kind is not always in its config. So one row is scored by
    all ranks of a group together, and by each of them whole.

    Raises:
        ValueError: the losses differ.
    """
    split = engine.model.split
    if split.ranks == 1:
        return
    vocab = model_config.get_text_config().vocab_size
    ids = np.arange(1, 38) * 7919 % vocab
    trained = np.ones(len(ids), dtype=bool)
    row = make_row([Candidate(0, ids[:12], trained[:12]), Candidate(1, ids[12:], trained[12:])])
    shared = engine.score([row], ScoreRequest()).loss
    engine.model.split = ALONE
    whole = engine.score([row], ScoreRequest()).loss
    engine.model.split = split
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    # Weights that give no finite loss are told by the first steps.
    if bool(((shared - whole).abs() > tolerance * whole.abs()).any()):
        raise ValueError(
            f"engine.sequence_parallel: {model_config.model_type} has more than attention that "
            "looks at other tokens (a convolution, a shift, positions of its own): its losses "
            f"are {shared.tolist()} on {split.ranks} ranks, {whole.tolist()} on one; set "
            "engine.sequence_parallel 1"
        )


def check_isolation(engine: ScoringEngine, model_config: Any, attention: str) -> None:
    """Refuse a model in which the samples of a packed row see each other.

    An architecture may ignore `position_ids` and the samples' lengths without a word. So one sample
    is scored twice, in rows that differ in the sample before it alone.

    Raises:
        ValueError: its loss differs.
    """
    vocab = model_config.get_text_config().vocab_size
    ids = np.arange(1, 19) * 7919 % vocab  # a prime, so that they differ
    trained = np.ones(len(ids), dtype=bool)
    rows = [
        make_row([Candidate(at, first, trained[:6]), Candidate(at + 1, ids[6:], trained[6:])])
        for at, first in ((0, ids[:6]), (2, ids[5::-1]))
    ]
    loss = engine.score(rows, ScoreRequest()).loss
    if abs(float(loss[3] - loss[1])) > 1e-6 * float(loss[1]):
        raise ValueError(
            f"samples of a packed row see each other in {model_config.model_type} with "
            f"model.attention {attention}: try packed, sdpa or flash_attention_2; architectures "
            "that give their attention neither positions nor lengths cannot be trained here"
        )


def check_head(engine: ScoringEngine, model_config: Any, dtype: str) -> None:
    """Refuse a model whose loss is not the closed form over its last hidden states.

    An architecture may have a layer, a scale or a cap between them and its logits that nobody here
    knows of. So the loss of one sample is compared with that of the model's own logits.

    Raises:
        ValueError: they differ.
    """
    vocab = model_config.get_text_config().vocab_size
    ids = np.arange(1, 13) * 7919 % vocab
    row = make_row([Candidate(0, ids, np.ones(len(ids), dtype=bool))])
    ours = float(engine.score([row], ScoreRequest()).loss[0])
    theirs = engine.own_loss(row)
    # Weights that give no finite loss are told by the first steps.
    tolerance = (1e-4 if dtype == "float32" else 1e-2) * abs(theirs)
    if math.isfinite(theirs) and not abs(ours - theirs) <= tolerance:
        tokens = len(ids) - 1
        raise ValueError(
            f"{model_config.model_type} computes its logits in another way than by one linear head"
            f" over its last hidden states: the loss here is {ours / tokens:.4f} nats per token,"
            f" by its own logits {theirs / tokens:.4f}; it cannot be trained here"
        )


def check_reuse(engine: ScoringEngine, forward: str) -> None:
    """See that the model's blocks can be recorded, before anything is trained; where `forward` is
    `auto` and they cannot, training goes on without reuse.

    Raises:
        ValueError: `forward` is `reuse` and they cannot.
    """
    if not engine.can_reuse:
        return
    ids = np.arange(1, 3)
    try:
        engine.score([make_row([Candidate(0, ids, ids > 0)])], ScoreRequest(), keep=True)
    except ValueError as error:
        if forward == "reuse":
            raise
        engine.give_up_reuse(str(error))
    else:
        engine.forget_scoring()


def check_boundaries(run: Run) -> None:
    """Refuse forward reuse whose block inputs cannot fit, before any step is taken.

    Raises:
        ValueError: the boundaries of a rank's candidates exceed the memory that is free for them.
    """
    text = run.inputs.model_config.get_text_config()
    local = run.config.batch.candidates / run.comm.world * float(run.inputs.train.lengths.mean())
    value = {"float32": 4, "bfloat16": 2}[run.config.model.dtype]
    layers, width = text.num_hidden_layers, text.hidden_size
    need = local * width * (layers + 1) * value
    on_cpu = run.engine.device.type == "cpu"
    on_host = run.config.step.boundaries == "host" or on_cpu
    if on_host and not on_cpu:
        row = run.config.score_row_tokens // run.comm.sharing
        need = host_boundary_bytes(local, row, layers, width, value)
    if on_host:
        sharing = ranks_said(os.environ, "LOCAL_WORLD_SIZE", run.comm.world)
        free = psutil.virtual_memory().available / sharing
    else:
        free = float(torch.cuda.mem_get_info(run.engine.device)[0])
    if need > free:
        raise ValueError(
            f"forward reuse keeps about {need / 2**30:.1f} GiB of block inputs on a rank, "
            f"{free / 2**30:.1f} GiB are free for them on the {'host' if on_host else 'device'}: "
            "lower batch.candidates, use step.boundaries: host, or step.forward: separate"
        )
