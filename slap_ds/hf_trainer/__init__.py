"""Selection inside transformers' Trainer and TRL's SFTTrainer: docs/trainers.md.

class MyTrainer(SlapTrainerMixin, Trainer): ...      any trainer that derives from transformers'
SlapTrainer, SlapSFTTrainer                          these two, ready made
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from slap_ds.hf_trainer.mixin import SlapTrainerMixin

if TYPE_CHECKING:
    from typing import TypeAlias

    SlapSFTTrainer: TypeAlias = Any


class SlapTrainer(SlapTrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer that trains a part of each candidate batch."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name != "SlapSFTTrainer":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            from trl import SFTTrainer
        except ImportError as error:
            raise ImportError(
                f"SlapSFTTrainer needs TRL ({error}): pip install 'slap_ds[trl]'"
            ) from None
        doc = {"__doc__": "TRL's SFTTrainer that trains a part of each candidate batch."}
        made = type(name, (SlapTrainerMixin, SFTTrainer), {**doc, "__module__": __name__})
        globals()[name] = made
        return made


__all__ = ["SlapSFTTrainer", "SlapTrainer", "SlapTrainerMixin"]
