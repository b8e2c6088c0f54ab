"""Follow: weights that give the float layer's output on what really comes in, behind rounded layers.

In: a graph with statistics of the inputs beside those of the float model. Out: drafts of other weights,
still floats, for `clip` and `gptq` to round.

    the layers before make of x = [1 1] x' = [1.1 1.1], w = [1 1]:   w' x' = w x for w' = [0.91 0.91]

With y what the float model has where x comes in, the W' of least |W' x - W y|^2 is W (E y x^T) (E x x^T)^-1;
it is computed as W + W (E y x^T - E x x^T) (E x x^T + damping)^-1, so that damping keeps it near W. What
rounding then adds is a matter of x alone, so any solver may come next. The aim is that of GPTAQ (Li et al.,
arXiv 2504.02692), who take it in column by column, and of Qronos (Zhang et al., arXiv 2505.11695).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...formats import BitfoldError
from .draft import Draft
from .moments import factored
from .solve import Solver, Task


@dataclass(frozen=True)
class Follow(Solver):
    """share: how much of the way is gone, 1 being all of it (less fits less to the calibration data);
    damping: share of the moment's mean diagonal that is added to it."""

    name: ClassVar[str] = "follow"
    needs_inputs: ClassVar[bool] = True
    wants_exact: ClassVar[bool] = True
    decides: ClassVar[Literal["weights", "scales", "codes", ""]] = "weights"

    share: float = 1.0
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.damping < math.inf):
            raise BitfoldError(f"follow takes a share in (0, 1] and damping above 0, not {self}")

    def solve(self, task: Task) -> Draft:
        draft, inputs = task.draft, task.inputs
        assert inputs is not None
        if draft.params is not None:
            raise BitfoldError("follow changes what is rounded; put it first")
        if inputs.cross is None:  # measured in the float model: nothing before it is rounded
            return draft
        if not bool(inputs.moment.any()):  # nothing but zeros came in, on which all weights agree
            return draft
        apart = (inputs.cross - inputs.moment).double()
        lower = factored(inputs.moment, self.damping)
        change = torch.cholesky_solve((draft.weight.double() @ apart).mT, lower).mT
        return Draft(draft.weight + self.share * change.to(draft.weight.dtype))
