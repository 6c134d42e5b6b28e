"""Whole conversations of a run: what was picked most, dropped most and never trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slap_ds.config.schema import Config
from slap_ds.data.reread import reread_few
from slap_ds.data.samples import Rules
from slap_ds.data.templates import make_template
from slap_ds.report.coverage import Coverage, Int64
from slap_ds.report.page import conversation, heading, paragraph
from slap_ds.train.inputs import Inputs

EACH = 3


def conversations(config: Config, inputs: Inputs, covered: Coverage) -> list[str]:
    """The page's part: three samples of each kind, no sample twice.

    Raises:
        FileNotFoundError, ValueError: the data can no longer be read.
    """
    chosen = choose(inputs, covered)
    rules = Rules.of(config.data, make_template(config.data.template, inputs.tokenizer))
    wanted = [i for places in chosen.values() for i in places]
    found = reread_few(inputs.train, wanted, config.data.train, rules)
    parts = [heading("Conversations")]
    for kind, places in chosen.items():
        parts.append(heading(kind, 3))
        if not places:
            parts.append(paragraph("None.", quiet=True))
        for i in places:
            talk = found[i]
            labels = [label for label in (talk.task, talk.source, talk.lang) if label]
            times = f"trained {covered.kept[i]} of the {covered.drawn[i]} times it was a candidate"
            parts.append(conversation(", ".join([times, *labels]), talk.messages))
    return parts


def choose(inputs: Inputs, covered: Coverage) -> dict[str, Sequence[int]]:
    """Kind -> positions in the store. Of equal counts those come first whose hash of the content is
    smallest: any order but that of the files, and always the same."""
    drawn, kept = covered.drawn, covered.kept
    content = inputs.train.content
    dropped = drawn - kept
    taken: set[int] = set()

    def first(score: Int64, among: np.ndarray) -> list[int]:
        order = np.lexsort((content, -score))
        new = [int(i) for i in order if among[i] and int(i) not in taken][:EACH]
        taken.update(new)
        return new

    return {
        "Trained most often": first(kept, kept > 0),
        "Dropped most often, trained at other times": first(dropped, (dropped > 0) & (kept > 0)),
        "Candidates and never trained": first(drawn, (drawn > 0) & (kept == 0)),
    }
