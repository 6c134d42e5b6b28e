"""Training: what a run is made of, its step, its loop, what it writes down.

The folder can be called: `slap_ds.train(config)` is `call.train(config)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **named: Any) -> Any:
        from slap_ds.train.call import train

        return train(*args, **named)


# A package's attribute of this name is the folder as soon as anything in it has been imported.
sys.modules[__name__].__class__ = _Callable
