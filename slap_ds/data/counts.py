"""What became of the rows of a store, and what of it the user must be told."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What became of the rows: rows = stored + rejected + dropped_too_long
    + dropped_no_trained_tokens."""

    rows: int = 0
    """Rows read, of all files."""
    rejected: int = 0
    """Rows that could not be used; each stands in rejects.jsonl."""
    truncated: int = 0
    """Stored samples that were cut to max_tokens."""
    dropped_too_long: int = 0
    dropped_no_trained_tokens: int = 0
    """Samples without a trained token, mostly because the cut took the whole answer."""
    tokens: int = 0
    """Tokens stored."""
    trained_tokens: int = 0
    """Tokens predicted with loss."""
    context_turns: int = 0
    """Answers of stored samples that should be trained and are context alone, because the template
    writes them otherwise than when they are generated."""
    with_media: int = 0
    """Stored samples whose rows have images, sounds or films, which are not trained."""


def say_aloud(counts: Counts, notes: Sequence[str]) -> None:
    """Warn of what is in the rows and is not trained, and of the template's `notes`."""
    for note in notes:
        logger.warning(note)
    if counts.with_media:
        logger.warning(
            "%d samples have images, audio or video: only their text is trained",
            counts.with_media,
        )
    if counts.context_turns:
        logger.warning(
            "%d answers are context and not trained: the tokenizer's chat template writes them"
            " differently once the conversation continues (docs/data.md)",
            counts.context_turns,
        )
