"""RHO-LOSS: what is not learnt yet and can be (Mindermann et al. 2022, section 3, equation 3)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import Course, ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import largest


@dataclass
class RhoLoss(Stateless):
    """The M largest of loss - reference loss; ties go to the lower position.

    The reference ("irreducible") loss of a sample is that of a model trained on other, held-out
    data, and is read from a file that `slap-ds losses` writes: a JSON object a line, `id` and
    `loss`, nats per response token. Both losses are means over the response tokens. The paper picks
    10 % of 320 candidates; the budget here is `selection.keep`.

    Raises:
        ValueError, FileNotFoundError: no file, not in that form, or without some of the samples.
    """

    path: str | None
    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"loss"})
    _ids: Tensor = field(init=False, repr=False)
    _loss: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError(
                "selection.method rho_loss needs selection.reference_losses, the file of each "
                "sample's loss under a reference model: slap-ds losses writes one"
            )
        self._ids, self._loss = read_losses(Path(self.path))

    def begin(self, course: Course) -> None:
        _, known = self._find(course.ids)
        if not known.all():
            raise ValueError(
                f"{self.path} lacks {int((~known).sum())} of the {len(known)} training samples "
                f"(the first: id {int(course.ids[~known][0])}): write it with slap-ds losses, on "
                "the same data files, template and max_tokens"
            )

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.ids is not None, "rho_loss needs sample ids"
        at, known = self._find(batch.ids.cpu())
        assert known.all(), "begin() has seen every training sample"
        reducible = batch.loss.cpu().double() - self._loss[at]
        return unweighted(largest(reducible, batch, budget))

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where each id stands in the table, and whether it does at all."""
        at = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        return at, self._ids[at] == ids


def read_losses(path: Path) -> tuple[Tensor, Tensor]:
    """The (n,) int64 ids, ascending, and (n,) float64 losses of a file of `slap-ds losses`.

    Raises:
        ValueError, FileNotFoundError: naming the line that is not in its form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"selection.reference_losses: no file at {str(path)!r}")
    table: dict[int, float] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                key, loss = record["id"], record["loss"]
                if type(key) is not int or not math.isfinite(loss):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'{path}, line {number}: expected {{"id": integer, "loss": number}}, found '
                    f"{line.strip()[:60]!r}"
                ) from None
            if key in table:
                raise ValueError(f"{path}, line {number}: sample id {key} stands there twice")
            table[key] = float(loss)
    if not table:
        raise ValueError(f"{path} holds no losses")
    ids, order = torch.tensor(list(table), dtype=torch.int64).sort()
    return ids, torch.tensor(list(table.values()), dtype=torch.float64)[order]
