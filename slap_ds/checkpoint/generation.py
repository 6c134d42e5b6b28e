"""The generation settings of an exported model: its base's, mended where they are invalid."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig


def generation_config(base: str | None, model: Any, stop_ids: Sequence[int] | None) -> Any:
    """The settings beside the weights at `base`, else the model's own; with `stop_ids` as the
    tokens that end an answer, where they are given.

    Values for sampling that stand beside do_sample false, which transformers refuses to write,
    come with do_sample true; what is invalid even so is dropped. Either is said in a line.
    """
    found = model.generation_config
    if base is not None:
        try:
            found = GenerationConfig.from_pretrained(base)
        except (OSError, ValueError):  # there are none
            found = model.generation_config
    if stop_ids is not None:
        found.eos_token_id = list(stop_ids)
    if _problem(found) is None:
        return found
    sampling = GenerationConfig.from_dict({**found.to_dict(), "do_sample": True})
    if (problem := _problem(sampling)) is None:
        _say("the base's generation settings sample without do_sample: it is set to true")
        return sampling
    kept = {
        name: getattr(found, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")
    }
    _say(f"the base's generation settings are invalid and left out: {problem}")
    return GenerationConfig(**kept)


def _problem(settings: GenerationConfig) -> str | None:
    """Why transformers would refuse to write these settings."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())[:200]
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr)
