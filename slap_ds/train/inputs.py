"""What a run reads before any weight is made: tokenizer, model config, token stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slap_ds.checkpoint import find as checkpoints
from slap_ds.config.schema import Config
from slap_ds.data.build import build_store
from slap_ds.data.kept_tokenizer import check_tokenizer
from slap_ds.data.samples import Rules
from slap_ds.data.store import TokenStore
from slap_ds.data.stream import CandidateStream
from slap_ds.data.templates import make_template
from slap_ds.estimate import Shape
from slap_ds.estimate.advice import FILLED, fewest_rows
from slap_ds.models.load import check_fit, check_window, load_config, load_tokenizer
from slap_ds.models.split import check_split
from slap_ds.scoring import Scorer, ScoringPlan
from slap_ds.selection import Course, Selector, make_selector


@dataclass
class Inputs:
    """What a run reads, before any weight is made."""

    model_config: Any
    tokenizer: Any
    train: TokenStore
    eval: TokenStore | None
    validation: TokenStore | None = None  # what selection looks at beside the candidates


def read_inputs(
    config: Config,
    progress: Callable[[int], None] | None = None,
    write_rejects: bool = True,
) -> Inputs:
    """Tokenizer, model config and token stores, checked against each other.

    Args:
        progress: called with the rows read so far, of one store after the other.
        write_rejects: put lists of the rows that cannot be used into the run's folder.
    """
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path or "")
    model_config = load_config(config.model.path, config.model.config)
    check_fit(model_config, tokenizer, config.data.max_tokens)
    check_window(model_config, config.model.attention, config.data.max_tokens)
    check_split(model_config, config.engine.sequence_parallel)
    width, dim = model_config.get_text_config().hidden_size, config.scoring.sketch_dim
    if dim is not None and dim >= width:
        raise ValueError(
            f"scoring.sketch_dim is {dim}, not below the model's width {width}, so a projection "
            "would only lose something: set scoring.sketch_dim null"
        )
    template = make_template(config.data.template, tokenizer)
    check_tokenizer(tokenizer, template)
    run_dir = Path(config.run_dir)

    def store(paths: list[str], rejects: str) -> TokenStore:
        return build_store(
            paths,
            **vars(Rules.of(config.data, template)),
            cache_dir=_cache_dir(config),
            max_reject_share=config.data.max_reject_share,
            rejects_path=run_dir / rejects if write_rejects else None,
            progress=progress,
        )

    train = store(config.data.train, "rejects.jsonl")
    held_out = store(config.data.eval, "rejects-eval.jsonl") if config.data.eval else None
    validation = None
    if config.selection.validation:
        validation = store(config.selection.validation, "rejects-validation.jsonl")
        shared = 0
        if held_out is not None:
            shared = int(np.isin(validation.content, held_out.content).sum())
        if shared:
            raise ValueError(
                f"{shared} samples of selection.validation are in data.eval too: what selection "
                "has looked at cannot measure it; take other samples for one of them"
            )
    return Inputs(model_config, tokenizer, train, held_out, validation)


def check_trained(config: Config, command: str) -> None:
    """Refuse to score with fresh weights, whose losses say nothing of any sample.

    Raises:
        ValueError: the config has `model.config`.
    """
    if config.model.path is not None:
        return
    run_dir = config.run_dir
    name = "MODEL_FOLDER"
    remedy = "train first, or name a model"
    if checkpoints.find(Path(run_dir)):
        name = f"{run_dir}/model"
        remedy = f"`slap-ds export {run_dir}` gives this run's"
    raise ValueError(
        f"{command} scores with a model, and model.config makes one of random weights: {remedy}, "
        f"and add --model.config null --model.path {name}"
    )


def _cache_dir(config: Config) -> Path:
    if given := config.data.cache_dir or os.environ.get("SLAP_CACHE_DIR"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "slap_ds"
    except RuntimeError:
        raise ValueError(
            "this user has no home folder, so there is no place for tokenised data: set"
            " data.cache_dir or SLAP_CACHE_DIR"
        ) from None


def settle_candidates(
    config: Config, model_config: Any, sample_tokens: float, response_share: float, ranks: int
) -> Config:
    """`config` with the candidates that `batch.rows_per_rank` asks for, if it asks.

    Args:
        sample_tokens: mean tokens of a sample. response_share: of them that are trained.
    """
    rows = config.batch.rows_per_rank
    if rows is None:
        return config
    if rows == "auto":
        shape = Shape.of(model_config, config.model.lora)
        rows = fewest_rows(config, shape, sample_tokens, response_share, ranks)
    tokens = FILLED * rows * config.engine.groups(ranks) * config.batch.micro_batch_tokens
    changes = {"candidates": max(1, round(tokens / sample_tokens)), "rows_per_rank": rows}
    return config.model_copy(update={"batch": config.batch.model_copy(update=changes)})


def settled(config: Config, inputs: Inputs, ranks: int) -> Config:
    """The same by the samples that were read."""
    lengths, trained = inputs.train.lengths, inputs.train.trained_tokens
    if config.batch.rows_per_rank is None or not len(lengths):
        return config
    share = float(trained.sum() / lengths.sum())
    return settle_candidates(config, inputs.model_config, float(lengths.mean()), share, ranks)


def make_parts(config: Config, store: TokenStore) -> tuple[CandidateStream, Scorer, Selector]:
    """The stream, scorer and selector of a configuration, in their starting state.

    Raises:
        ValueError: the method wants a number of each sample that ranks cannot sum over its parts.
    """
    stream = CandidateStream(
        len(store), config.batch.candidates, config.seed, steps=config.steps, epochs=config.epochs
    )
    selector = make_selector(config.selection.model_dump())
    ids, candidates = torch.from_numpy(store.sample_ids), config.batch.candidates
    if "nuclear" in selector.needs and config.engine.sequence_parallel > 1:
        raise ValueError(
            f"selection.method {config.selection.method} takes the nuclear norm of a sample's "
            "logits, which is no sum over the ranks that share it: set engine.sequence_parallel 1, "
            "or choose another method"
        )
    selector.begin(Course(ids, len(stream), candidates))
    scoring = config.scoring.resolved(selector.unit_sketches)
    scorer = Scorer(ScoringPlan(scoring, selector.needs, config.seed))
    return stream, scorer, selector
