"""Samples of random tokens, for a benchmark that needs no data and no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from slap_ds.config.schema import Config
from slap_ds.data.counts import Counts
from slap_ds.data.store import LABELS, Sample, TokenStore
from slap_ds.models.load import load_config
from slap_ds.train.inputs import Inputs


class RandomStore(TokenStore):
    """n samples of random ids, made when they are read; nothing is on disk.

    Lengths are log-normal with this mean before they are cut to [2, max_tokens]; `spread` is the
    standard deviation of their logarithm, 0 for equal lengths.
    """

    def __init__(
        self,
        n: int,
        vocab: int,
        mean_tokens: float,
        spread: float,
        response_share: float,
        max_tokens: int,
        seed: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        drawn = rng.lognormal(np.log(mean_tokens) - spread**2 / 2, spread, n)
        self.folder = Path()
        self.lengths = drawn.round().astype(np.int64).clip(2, max_tokens)
        self.trained_tokens = (self.lengths * response_share).astype(np.int64)
        self.trained_tokens = self.trained_tokens.clip(1, self.lengths - 1)
        self.content = np.arange(n, dtype=np.int64)
        self.sample_ids = np.arange(n, dtype=np.int64)
        self.task = self.source = self.lang = np.zeros(n, dtype=np.int32)
        self.names = {label: ["random"] for label in LABELS}
        tokens, trained = int(self.lengths.sum()), int(self.trained_tokens.sum())
        self.counts = Counts(rows=n, tokens=tokens, trained_tokens=trained)
        self.fingerprint = f"random {n} {vocab} {mean_tokens} {spread} {response_share} {seed}"
        self._vocab, self._seed = vocab, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        rng = np.random.default_rng([self._seed, index])
        length = int(self.lengths[index])
        ids = rng.integers(0, self._vocab, length, dtype=np.int32)
        return Sample(ids, np.arange(length) >= length - int(self.trained_tokens[index]))


def random_inputs(
    config: Config, mean_tokens: float, spread: float, response_share: float
) -> Inputs:
    """Inputs of a run on random data: as many samples as eight steps draw.

    Raises:
        ValueError: numbers out of range, or samples longer than the model's positions.
    """
    if not 2 <= mean_tokens <= config.data.max_tokens:
        raise ValueError(
            f"--sample-tokens is {mean_tokens:g}, expected 2 to data.max_tokens, "
            f"{config.data.max_tokens}"
        )
    if spread < 0 or not 0 < response_share < 1:
        raise ValueError(
            f"--spread is {spread:g} and --response-share {response_share:g}, expected at least 0 "
            "and a share between 0 and 1"
        )
    model_config = load_config(config.model.path, config.model.config)
    text = model_config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or config.data.max_tokens
    if most < config.data.max_tokens:
        raise ValueError(
            f"data.max_tokens is {config.data.max_tokens}, the model has {most} positions: lower it"
        )
    store = RandomStore(
        8 * config.batch.candidates,
        cast(int, text.vocab_size),
        mean_tokens,
        spread,
        response_share,
        config.data.max_tokens,
        config.seed,
    )
    return Inputs(model_config, None, store, None)
