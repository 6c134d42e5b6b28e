"""Selection methods by name; a selector is a pure function of what was scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slap_ds.selection.adacore import AdaCore
from slap_ds.selection.balance import select_balanced
from slap_ds.selection.base import ScoredBatch, Selection, Selector, Signal, select
from slap_ds.selection.divbs import DivBS
from slap_ds.selection.grand import Grand
from slap_ds.selection.k_center import KCenter
from slap_ds.selection.simple import Full, Hard, Random
from slap_ds.selection.slap import Slap

SELECTORS: dict[str, Callable[[Mapping[str, Any]], Selector]] = {
    "adacore": lambda options: AdaCore(),
    "divbs": lambda options: DivBS(),
    "full": lambda options: Full(),
    "grand": lambda options: Grand(),
    "hard": lambda options: Hard(),
    "k_center": lambda options: KCenter(),
    "random": lambda options: Random(),
    "slap": lambda options: Slap(
        strata=options["strata"],
        strata_by=options["strata_by"],
        budgets=options["budgets"],
        temperature=options["temperature"],
        across_strata=options["across_strata"],
    ),
}


def make_selector(options: Mapping[str, Any]) -> Selector:
    """The selector of a `selection` config section, given as a mapping.

    Raises:
        ValueError: unknown method; the message lists the known ones.
    """
    method = options["method"]
    if method not in SELECTORS:
        raise ValueError(
            f"selection.method is {method!r}, expected one of {', '.join(sorted(SELECTORS))}"
        )
    return SELECTORS[method](options)


__all__ = [
    "SELECTORS",
    "ScoredBatch",
    "Selection",
    "Selector",
    "Signal",
    "make_selector",
    "select",
    "select_balanced",
]
