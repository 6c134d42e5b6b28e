"""slap_ds: train on the samples worth training, chosen at every step, under DeepSpeed ZeRO-3.

The names below are the public interface (docs/api.md); each is imported when it is first used, so
that `import slap_ds` itself loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slap_ds.api.score import score
    from slap_ds.api.select import select
    from slap_ds.config.schema import Config
    from slap_ds.ops import FarthestPoints, farthest_point
    from slap_ds.selection import (
        ScoredBatch,
        Selection,
        Selector,
        Stateless,
        register_selector,
        unweighted,
    )
    from slap_ds.train.call import Callback, TrainResult, train

__version__ = "0.2.0"

# Where each name comes from. `train` is the folder of that name, which can be called.
_HOMES = {
    "Callback": "slap_ds.train.call",
    "Config": "slap_ds.config.schema",
    "FarthestPoints": "slap_ds.ops",
    "ScoredBatch": "slap_ds.selection",
    "Selection": "slap_ds.selection",
    "Selector": "slap_ds.selection",
    "Stateless": "slap_ds.selection",
    "TrainResult": "slap_ds.train.call",
    "farthest_point": "slap_ds.ops",
    "register_selector": "slap_ds.selection",
    "score": "slap_ds.api.score",
    "select": "slap_ds.api.select",
    "unweighted": "slap_ds.selection",
}


if not TYPE_CHECKING:  # to which it would make every name a known one

    def __getattr__(name: str) -> Any:
        if name == "train":
            return import_module("slap_ds.train")
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'slap_ds' has no attribute {name!r}")


__all__ = [
    "Callback",
    "Config",
    "FarthestPoints",
    "ScoredBatch",
    "Selection",
    "Selector",
    "Stateless",
    "TrainResult",
    "__version__",
    "farthest_point",
    "register_selector",
    "score",
    "select",
    "train",
    "unweighted",
]
