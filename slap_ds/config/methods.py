"""`selection.METHOD`: the settings of each selection method that has some of its own.

They become the fields of the method's selector in slap_ds.selection.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slap_ds.config.section import Section


class SampledConfig(Section):
    """`selection.sampled`, for method sampled."""

    by: Literal["size", "loss"] = "size"
    """size: chances by response tokens and cost, nothing is scored; loss: times the mean loss, for
    which all candidates are scored."""
    least: float = Field(0.1, gt=0, le=1)
    """Smallest chance; no pick weighs more than its inverse."""


class SlapConfig(Section):
    """`selection.slap`, for method slap."""

    strata: int = Field(4, ge=1)
    """K: number of loss strata."""
    strata_by: Literal["quantile", "width"] = "quantile"
    """Equal counts, or equal loss ranges between the smallest and the largest loss."""
    budgets: Literal["sampled", "expected"] = "sampled"
    """Budget per stratum: counted from a Gumbel top-M draw, or its expectation rounded."""
    preset: Literal["measured", "paper"] = "measured"
    """Which sketches it takes if scoring.sketch_norm does not say. measured: of unit length, as
    docs/experiments.md supports; paper: as they are, our reading of the paper."""
    temperature: float = Field(1.0, gt=0)
    """Divides the losses in softmax(loss / temperature); nats per token."""
    reweight: Literal["none", "inverse"] = "none"
    """inverse: picks of a stratum weigh its size over its budget, so that hard samples count
    no more than in the whole batch; scaled to mean 1."""
    across_strata: bool = True
    """Measure distances to the picks of earlier strata too."""


class CcsConfig(Section):
    """`selection.ccs`, for method ccs."""

    beta: float = Field(0.0, ge=0, lt=1)
    """Share of the candidates dropped as hardest; published: 0.2 at 80 % pruning, 0.3 at 90 %."""
    strata: int = Field(50, ge=1)
    """Strata of equal loss ranges."""


class InfoBatchConfig(Section):
    """`selection.infobatch`, for method infobatch."""

    r: float | None = Field(None, gt=0, lt=1)
    """Probability of dropping a candidate whose remembered loss is below the mean; default: what
    keeps selection.keep of all candidates of the run. Published: 0.5."""
    delta: float = Field(0.875, gt=0, le=1)
    """Share of the run after which nothing is dropped."""


class SelectiveBackpropConfig(Section):
    """`selection.selective_backprop`, for the method of that name."""

    schedule: Literal["always", "published"] = "always"
    """always: every step trains selection.keep of its candidates; published: only from start to
    end of the run, and there every interrupt-th step trains all."""
    start: float = Field(0.5, ge=0, le=1)
    """published: share of the run before which all are trained."""
    end: float = Field(0.9, ge=0, le=1)
    """published: share of the run after which all are trained."""
    interrupt: int = Field(2, ge=0)
    """published: every how many steps all are trained; 0: none."""


class UdsConfig(Section):
    """`selection.uds`, for method uds."""

    alpha: float | None = Field(None, ge=0)
    """Weight of the mean distance to recent picks; default: what gives it the standard deviation of
    the nuclear norms, step by step. Published, for other embeddings: 1.5e-3."""
    queue: int = Field(1024, ge=1)
    """How many recent picks are remembered."""
    width: int = Field(1024, ge=1)
    """Numbers of an embedding; wider hidden states are projected by random signs."""


class GreatsConfig(Section):
    """`selection.greats`, for method greats."""

    batch: int = Field(2, ge=1)
    """Validation samples drawn at each step."""
    eta: float | None = Field(None, ge=0)
    """Step size in the score; default: the step's learning rate."""
