"""Descend: go over the columns again, and round each to what is best given all the others.

In: a graph whose drafts have values (after gptq), or scales, and statistics of the inputs. Out: the same
scales and codes of no larger output error.

    gptq decides column 3 before it knows what column 9 becomes; a second look at 3 knows

Coordinate descent on the output error (W' - W) H (W' - W)^T: with every other column fixed, the best value of
column j is w'_j - (D H)_j / H_jj, D the difference so far; rounding that is optimal for the column, since the
error is a parabola in it. Behdin et al., "QuantEase", arXiv 2309.01885, algorithm 2; started from GPTQ, as in
Nair and Suggala, "CDQuant", arXiv 2406.17542.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ...formats import BitfoldError
from ...formats.fit import Columns
from .columns import column_device
from .draft import Draft
from .moments import damped
from .solve import Solver, Task


@dataclass(frozen=True)
class Descend(Solver):
    """sweeps: how often all columns are looked at; damping: as gptq's."""

    name: ClassVar[str] = "descend"
    needs_inputs: ClassVar[bool] = True
    decides: ClassVar[Literal["weights", "scales", "codes", ""]] = "codes"

    sweeps: int = 2
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.sweeps < 1 or not 0 <= self.damping < math.inf:
            raise BitfoldError(f"descend makes 1 or more sweeps, with damping of 0 or more, not {self}")

    def solve(self, task: Task) -> Draft:
        f, w = task.format, task.weight
        if w.ndim != 2:
            raise BitfoldError(f"descend rounds matrices, not a weight of {list(w.shape)}")
        params, there = task.draft.chosen(f), column_device(w)
        columns = Columns(f, [part.to(there) for part in params], w.shape[0])
        h, weight = damped(task.moment, self.damping).to(there), w.to(there)
        active = (h.diagonal() > 0).tolist()
        values = task.draft.rounded(f).to(there, copy=True)
        # (D H)_j is kept up to date a block of columns at a time: one product a block instead of one a
        # column.
        for _ in range(self.sweeps):
            for start in range(0, w.shape[1], 128):
                _sweep(values, weight, h, columns, slice(start, min(start + 128, w.shape[1])), active)
        return Draft(w, params, values.to(w.device))


def _sweep(values: Tensor, w: Tensor, h: Tensor, columns: Columns, part: slice, active: list[bool]) -> None:
    """One look at the columns of `part`, in place."""
    slope, inner = (values - w) @ h[:, part], h[part, part]
    for i in range(part.stop - part.start):
        j = part.start + i
        if not active[j]:
            continue
        old = values[:, j : j + 1].clone()
        new = columns.round(old - slope[:, i : i + 1] / inner[i, i], j)
        slope.addmm_(new - old, inner[i : i + 1])
        values[:, j : j + 1] = new
