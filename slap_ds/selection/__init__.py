"""Selection methods by name; a selector is a pure function of what was scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slap_ds.selection.base import Course, ScoredBatch, Selection, Selector, Signal, select
from slap_ds.selection.methods.adacore import AdaCore
from slap_ds.selection.methods.ccs import Ccs
from slap_ds.selection.methods.divbs import DivBS
from slap_ds.selection.methods.grand import Grand
from slap_ds.selection.methods.greats import Greats
from slap_ds.selection.methods.infobatch import InfoBatch
from slap_ds.selection.methods.k_center import KCenter
from slap_ds.selection.methods.moderate import Moderate
from slap_ds.selection.methods.rho_loss import RhoLoss
from slap_ds.selection.methods.sampled import Sampled
from slap_ds.selection.methods.selective_backprop import SelectiveBackprop
from slap_ds.selection.methods.simple import Easy, El2n, Full, Hard, Random
from slap_ds.selection.methods.uds import Uds
from slap_ds.selection.quotas import select_balanced
from slap_ds.selection.slap import Slap

SELECTORS: dict[str, Callable[[Mapping[str, Any]], Selector]] = {
    "adacore": lambda options: AdaCore(),
    "ccs": lambda options: Ccs(**options["ccs"]),
    "divbs": lambda options: DivBS(),
    "easy": lambda options: Easy(),
    "el2n": lambda options: El2n(),
    "full": lambda options: Full(),
    "grand": lambda options: Grand(),
    "greats": lambda options: Greats(options["validation"], options["greats"]["eta"]),
    "hard": lambda options: Hard(),
    "infobatch": lambda options: InfoBatch(options["keep"], **options["infobatch"]),
    "k_center": lambda options: KCenter(),
    "moderate": lambda options: Moderate(),
    "random": lambda options: Random(),
    "rho_loss": lambda options: RhoLoss(options["reference_losses"]),
    "sampled": lambda options: Sampled(options["keep"], **options["sampled"]),
    "selective_backprop": lambda options: SelectiveBackprop(
        options["keep"], **options["selective_backprop"]
    ),
    "slap": lambda options: Slap(**options["slap"]),
    "uds": lambda options: Uds(**options["uds"]),
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
    "Course",
    "ScoredBatch",
    "Selection",
    "Selector",
    "Signal",
    "make_selector",
    "select",
    "select_balanced",
]
