"""What a run leaves behind: checkpoints, evaluations, traces, trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from slap_ds.config.section import Section


class CheckpointConfig(Section):
    """`checkpoint`: when, how many, and how they are taken up again."""

    # `async` is a word of Python's.
    model_config = ConfigDict(serialize_by_alias=True)

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only after the last step."""
    keep_last: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""
    best: bool = False
    """Also save after every evaluation that lowers evaluation.metric, and keep the checkpoint of
    the lowest one beside the last; `slap-ds export RUN --best` writes it."""
    last: bool = True
    """Whether the last step ends with one; a run of a study that is only measured needs none."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: from the newest checkpoint of run_dir if there is one; never: refuse a used run_dir;
    must: refuse to start without a checkpoint."""
    background: bool = Field(False, alias="async")
    """Go on training while a thread writes a copy of the state in host memory; an error shows at
    the next step's edge."""
    reshard: bool = False
    """Let another number of ranks, or the other engine, continue from a checkpoint."""
    verify: bool = True
    """Compare the SHA-256 of every file before a checkpoint is used; false: only the sizes."""

    @property
    def at_once(self) -> int:
        """How many lie on the disk at most, the one that is being written included."""
        return self.keep_last + self.best + 1


class EvaluationConfig(Section):
    """`evaluation`: losses on the evaluation data during the run."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first step and after the last."""
    metric: str = "eval_loss"
    """What the best checkpoint and an early end go by: eval_loss, eval_loss_by_task.NAME or
    eval_loss_by_source.NAME, as in metrics.jsonl; lower is better."""
    patience: int = Field(0, ge=0)
    """End the run after so many evaluations in a row that did not lower `metric`; 0: never."""
    max_samples: int | None = Field(None, ge=1)
    """Evaluate on a fixed random subset of this size; default: all."""
    keep_losses: bool = False
    """Write every sample's loss to eval_samples.jsonl, for intervals over samples."""


class ProfileConfig(Section):
    """`profile`: traces of some steps, for chrome://tracing or perfetto."""

    steps: tuple[int, int] | None = None
    """First and last step of the trace, counted from 0; every rank writes profile/rank-N.json into
    run_dir, with the phases of the step as ranges (in NVTX too); default: none."""

    @field_validator("steps")
    @classmethod
    def _ordered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] <= value[1]:
            raise ValueError(f"steps is {list(value)}, expected [first, last], 0 <= first <= last")
        return value


class TrackingConfig(Section):
    """`tracking`: under which names the trackers of `report_to` show a run."""

    project: str = Field("slap_ds", min_length=1)
    """Project of W&B and Trackio, experiment of MLflow."""
    name: str | None = None
    """Name of the run there; default: that of its folder."""
