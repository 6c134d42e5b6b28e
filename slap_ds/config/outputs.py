"""What a run leaves behind: checkpoints, evaluations, traces, trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from slap_ds.config.section import Section

ANSWERS = "answers_by_task"  # in metrics.jsonl, and at the beginning of a metric's name


class CheckpointConfig(Section):
    """`checkpoint`: when, how many, and how they are taken up again."""

    # `async` is a word of Python's.
    model_config = ConfigDict(serialize_by_alias=True)

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only after the last step."""
    keep_last: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""
    best: bool = False
    """Also save after every evaluation that betters evaluation.metric, and keep the checkpoint of
    the best one beside the last; `slap-ds export RUN --best` writes it."""
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


class AnswersConfig(Section):
    """`evaluation.answers`: greedy answers to evaluation rows, as `slap-ds eval` gives and marks
    them."""

    samples: int = Field(20, ge=1)
    """Rows that are answered of each task, a fixed random subset of data.eval."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer."""
    every: int = Field(1, ge=1)
    """Answer at every so many-th evaluation; always before the first step and after the last."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens of prompts, filling and answers of one batch, whose keys and values a rank holds."""


class EvaluationConfig(Section):
    """`evaluation`: losses, and answers, on the evaluation data during the run."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first step and after the last."""
    metric: str = "eval_loss"
    """What the best checkpoint and an early end go by, as in metrics.jsonl: eval_loss,
    eval_loss_by_task.NAME or eval_loss_by_source.NAME, lower is better; or of `answers`
    answers_by_task.NAME.METRIC, such as answers_by_task.qa.f1, higher is better."""
    patience: int = Field(0, ge=0)
    """End the run after so many evaluations in a row that did not better `metric`; 0: never."""
    answers: AnswersConfig | None = None
    """Let the model answer evaluation rows; default: losses only."""
    max_samples: int | None = Field(None, ge=1)
    """Evaluate on a fixed random subset of this size; default: all."""
    keep_losses: bool = False
    """Write every sample's loss to eval_samples.jsonl, for intervals over samples."""

    @property
    def by_answers(self) -> bool:
        """Whether `metric` is one of answers, of which more is better."""
        return self.metric.partition(".")[0] == ANSWERS

    def answers_at(self, step: int, last: bool) -> bool:
        """Whether the evaluation after `step` (from 0; -1: before the first) has answers."""
        if self.answers is None:
            return False
        return last or (step + 1) % (max(1, self.every) * self.answers.every) == 0

    @model_validator(mode="after")
    def _has_its_metric(self) -> EvaluationConfig:
        if self.by_answers and self.answers is None:
            raise ValueError(
                f"metric {self.metric} is of answers, and there are none: set "
                "evaluation.answers.samples"
            )
        return self


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
