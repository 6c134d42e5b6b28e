"""Selection methods by name; a selector is a pure function of what was scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from slap_ds.selection.base import (
    Course,
    ScoredBatch,
    Selection,
    Selector,
    Signal,
    Stateless,
    select,
    unweighted,
)
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


# Where another package names its selectors, in its pyproject.toml.
ENTRY_POINTS = "slap_ds.selectors"
_registered: dict[str, Callable[..., Selector]] = {}


def register_selector(name: str, factory: Callable[..., Selector]) -> None:
    """Make `selection.method: name` work in this process, as an entry point does in all of them.

    Args:
        factory: called once a run with the settings in `selection.options` as keywords; a class
            that derives from `Stateless` is one. A name registered before is replaced.

    Raises:
        ValueError: the name is that of a built-in method, or empty.

    >>> register_selector("hard", Stateless)
    Traceback (most recent call last):
    ...
    ValueError: the selector's name 'hard' is that of a built-in method: choose another one
    """
    if not name.strip() or name in SELECTORS:
        taken = "is that of a built-in method" if name in SELECTORS else "is empty"
        raise ValueError(f"the selector's name {name!r} {taken}: choose another one")
    _registered[name] = factory


def make_selector(options: Mapping[str, Any]) -> Selector:
    """The selector of a `selection` config section, given as a mapping.

    Raises:
        ValueError: unknown method; the message lists the known ones. A selector from elsewhere
            cannot be imported, or lacks a part of the protocol.
    """
    method, further = options["method"], options.get("options", {})
    if method in SELECTORS and further:
        raise ValueError(
            f"selection.options holds {', '.join(sorted(further))}, for selectors from elsewhere: "
            f"the settings of {method} itself are in selection.{method}, if it has any"
        )
    if method in SELECTORS:
        return SELECTORS[method](options)
    selector = _from_elsewhere(method)(**further)
    parts = [*Selector.__annotations__, "begin", "budget", "select", "remember", "state_dict"]
    if lacking := [part for part in (*parts, "load_state_dict") if not hasattr(selector, part)]:
        raise ValueError(
            f"selection.method {method}: {type(selector).__name__} lacks {', '.join(lacking)}; "
            "derive it from slap_ds.Stateless, which has all but `needs` and `select`"
        )
    return selector


def _from_elsewhere(method: str) -> Callable[..., Selector]:
    """The factory that was registered under this name, or that an installed package offers."""
    if method in _registered:
        return _registered[method]
    offered = entry_points(group=ENTRY_POINTS)
    for entry in offered.select(name=method):
        try:
            factory: Callable[..., Selector] = entry.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"selection.method {method}: {entry.value}, of the entry points "
                f"{ENTRY_POINTS}, cannot be imported: {error}"
            ) from None
        return factory
    known = {*SELECTORS, *_registered, *offered.names}
    raise ValueError(f"selection.method is {method!r}, expected one of {', '.join(sorted(known))}")


__all__ = [
    "SELECTORS",
    "Course",
    "ScoredBatch",
    "Selection",
    "Selector",
    "Signal",
    "Stateless",
    "make_selector",
    "register_selector",
    "select",
    "select_balanced",
    "unweighted",
]
