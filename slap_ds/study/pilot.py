"""What a few hundred rows of a training set say about all of it, before anything is trained.

    token ids of all rows                                -> how many near-copies a row has
    answers given their own prompt, and given others'    -> ranks -> how many answers fit badly
    lengths, sources, losses of the rows                 -> spreads and shares

Pure functions of token ids, masks and losses; `advise.py` draws the rows and runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slap_ds.data.store import Sample
from slap_ds.selection.inclusion import chances

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def shingles(sample: Sample) -> Ints:
    """Distinct pairs of neighbouring tokens, (m,) int64: first, second, whether that is trained."""
    ids = sample.ids.astype(np.int64)
    return np.unique((ids[:-1] << 32 | ids[1:] << 1) | sample.mask[1:])


class Overlaps:
    """How much of what is particular to two rows they have in common.

    Rows are sets of shingles; a shingle weighs log(n / number of rows that hold it), so that a
    template, which all rows share, counts nothing. The overlap of two rows is the weight of what
    both hold / the weight of what either holds (weighted Jaccard), exactly, by an inverted index.
    """

    def __init__(self, rows: Sequence[Sample]) -> None:
        sets = [shingles(row) for row in rows]
        sizes = np.array([len(each) for each in sets])
        keys, column, held_by = np.unique(
            np.concatenate(sets), return_inverse=True, return_counts=True
        )
        self.columns = np.split(column, np.cumsum(sizes)[:-1])
        self.holders = np.repeat(np.arange(len(rows)), sizes)[np.argsort(column, kind="stable")]
        self.ends = np.cumsum(held_by)
        self.counts = held_by
        weight = np.log(len(rows) / held_by)
        trained = (keys & 1).astype(bool)
        self.weights = {"answer": weight * trained, "all": weight}
        self.totals = {
            part: np.bincount(np.repeat(np.arange(len(rows)), sizes), w[column], len(rows))
            for part, w in self.weights.items()
        }

    def of(self, row: int) -> Floats:
        """(n,) overlap of this row with every row: of answers or of whole texts, the smaller."""
        columns = self.columns[row]
        counts = self.counts[columns]
        starts = self.ends[columns] - counts
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        holders = self.holders[np.repeat(starts, counts) + steps]
        smallest = np.ones(len(self.columns))
        for part, weights in self.weights.items():
            total = self.totals[part]
            both = np.bincount(holders, np.repeat(weights[columns], counts), len(total))
            either = total + total[row] - both
            overlap = np.divide(both, either, out=np.ones_like(both), where=either > 1e-9)
            smallest = np.minimum(smallest, overlap)
        return smallest


def longest_answer(mask: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """[begin, end) of the longest run of trained tokens, of equal ones the first."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    begins, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - begins))
    return int(begins[longest]), int(ends[longest])


def exchanged(own: Sample, others: Sequence[Sample], most: int) -> list[Sample]:
    """A row's longest answer after all that precedes it, then after what precedes the others'.

    Args:
        most: longest row in tokens; what precedes an answer loses its beginning to fit, equally in
            all of them, and an answer its end if it leaves no room for as much.
    """
    begin, end = longest_answer(own.mask)
    answer = own.ids[begin : min(end, begin + max(1, most // 2))]
    prompts = [s.ids[: longest_answer(s.mask)[0]][len(answer) - most :] for s in (own, *others)]
    return [
        Sample(
            np.concatenate([prompt, answer]),
            np.arange(len(prompt) + len(answer)) >= len(prompt),
        )
        for prompt in prompts
    ]


def ranks(losses: Floats) -> Floats:
    """Where the own prompt stands among all, (P,) in [0, 1]: 0 if it explains the answer best.

    Args:
        losses: (P, 1 + R) of an answer given its own prompt, and given R others; any function of
            prompt and answer that is smaller where they fit.

    If an answer has nothing to do with its prompt, all places are equally probable.
    """
    own, others = losses[:, :1], losses[:, 1:]
    worse = (others < own).mean(1) + 0.5 * (others == own).mean(1)
    return np.asarray(worse, dtype=np.float64)


def token_weights(rows: Sequence[Sample], vocabulary: int) -> Floats:
    """(V,) nats: log(n / number of rows that hold a token), 0 for those that none holds."""
    held_by = np.zeros(vocabulary)
    for row in rows:
        held_by[np.unique(row.ids)] += 1
    weights: Floats = np.where(held_by > 0, np.log(len(rows) / np.maximum(held_by, 1)), 0.0)
    return weights


def in_common(sample: Sample, weights: Floats) -> float:
    """Weight of the tokens that stand in the answer and before it, in nats.

    A small model does not know yet that answers speak of what they were asked; this does.
    """
    both = np.intersect1d(sample.ids[sample.mask], sample.ids[~sample.mask])
    return float(weights[both].sum())


def likeness(one: Sample, other: Sample, weights: Floats) -> float:
    """Weight of the tokens that both rows' prompts hold / that either holds, in [0, 1]; 1: alike.

    What precedes the longest answer counts as prompt.
    """
    a, b = (np.unique(s.ids[: longest_answer(s.mask)[0]]) for s in (one, other))
    either = float(weights[np.union1d(a, b)].sum())
    return float(weights[np.intersect1d(a, b)].sum()) / either if either > 1e-9 else 1.0


@dataclass(frozen=True)
class Wrong:
    """How many answers have nothing to do with their prompts, as far as can be told."""

    at_most: float  # share of the training rows
    told: float  # share of the training rows in sources of which it can be told
    share: float  # of those rows whose answers fit badly, beyond what held-out rows do
    error: float  # one standard deviation of `share`, from the number of rows


def wrong_answers(
    prompts: int,
    found: Mapping[str, Floats],
    held: Mapping[str, Floats],
    blind: float,
) -> Wrong:
    """Shares of wrong answers from `ranks`, and from those of held-out rows as a yardstick.

    Wrong answers' ranks are uniform, right ones' are mostly 0. So the ranks in the upper half,
    divided by how many of uniform ones fall there, bound the share of wrong answers (Storey 2002's
    estimate of true null hypotheses). Of right answers that cannot be told from wrong ones a share
    h stands there too, which is that of held-out rows: (t - h) / (1 - h) are then wrong.

    Args:
        prompts: R, others' prompts per answer. found: ranks of the training rows, by source.
        held: the same of held-out rows. blind: sources whose mean of t and h is above are left out
            of `share`, and so are those that `held` lacks.
    """
    uniform = float((np.arange(prompts + 1) / prompts >= 0.5).mean())
    upper = {name: (found[name] >= 0.5, held.get(name, np.zeros(0)) >= 0.5) for name in found}
    rows = sum(len(ours) for ours, _ in upper.values())
    at_most = min(1.0, sum(float(ours.sum()) for ours, _ in upper.values()) / rows / uniform)
    told, t, h, variance = 0, 0.0, 0.0, 0.0
    for ours, theirs in upper.values():
        # Judged by both alike: the smaller h alone would favour sources by chance.
        if not len(theirs) or (ours.mean() + theirs.mean()) / 2 / uniform > blind:
            continue
        told += len(ours)
        t += float(ours.sum()) / uniform
        h += len(ours) * float(theirs.mean()) / uniform
        for part in (ours, theirs):
            # As if one more row had stood on each side: a few equal rows are no certainty.
            p = (float(part.sum()) + 1) / (len(part) + 2)
            variance += len(ours) ** 2 * p * (1 - p) / len(part) / uniform**2
    if not told:
        return Wrong(at_most, 0.0, 0.0, 0.0)
    excess = told - h
    share = float(np.clip((t - h) / excess, 0, 1))
    return Wrong(at_most, told / rows, share, math.sqrt(variance) / excess)


def size_gain(response: Ints, lengths: Ints, keep: float, least: float) -> float:
    """Variance of a step's gradient under `sampled`, in units of a random choice's at equal tokens.

    Both draw independently with chances p and weigh 1 / p; a row's part of the gradient is taken to
    be as long as the root of its response tokens, which `sampled` assumes (docs/method.md).

    Args:
        response, lengths: (P,) response tokens and all tokens of rows.
    """
    if keep == 1:
        return 1.0
    n, cost = torch.from_numpy(np.array(response)).double(), torch.from_numpy(np.array(lengths))
    chance = chances(n.sqrt(), cost, keep, min(least, keep))
    return float((n * (1 / chance - 1)).sum() / (n * (1 / keep - 1)).sum())


@dataclass(frozen=True)
class Work:
    """FLOPs of one forward over all candidates of a step, and how often training takes it."""

    blocks: float
    head: float
    passes: int  # forward, recompute, backward (two; one for frozen weights), in forwards
    head_passes: int
    reuses: bool  # the scoring forward serves as the training forward

    def rows(self, keep: float) -> list[dict[str, Any]]:
        """Cost of a step that trains `keep` of the tokens: `flops`, `units` of training all.

        Scoring is taken to be a plain forward (a sketch adds a little: docs/method.md).
        """
        forward = self.blocks + self.head
        full = self.passes * self.blocks + self.head_passes * self.head
        again = self.blocks * self.reuses
        costs = {
            "all data": full,
            "sampled, random": keep * full,
            "slap and others that score": forward + keep * (full - again),
        }
        return [{"step": k, "flops": v, "units": v / full} for k, v in costs.items()]
