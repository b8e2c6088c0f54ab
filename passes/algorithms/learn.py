"""Learn: which way each number is rounded, learned from what the whole block gives.

In: drafts of a block's weights. Out: the same scales; numbers rounded up or down so that the block's output
is nearest to the float block's.

    weight 0.45 in steps of 1: rounds to 0; a gradient that wants more moves it to 0.51, which rounds to 1

Rounding as something to learn is AdaRound's (Nagel et al., arXiv 2004.10568), a whole block's output as the
aim BRECQ's (Li et al., arXiv 2102.05426). How it is learned is AutoRound's (Cheng et al., "Optimize Weight
Rounding via Signed Gradient Descent", arXiv 2309.05516): each weight moves by the sign of its gradient, in
steps of a share of the format's spacing that falls to zero, by no more than one spacing; rounding passes the
gradient straight through. It starts from what the solvers before it have decided, and the best weights that
were seen are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ...formats import BitfoldError, Format
from ...formats.fit import spacing
from ..core import Pass
from ..stages import Stage
from .draft import Draft


@dataclass(frozen=True)
class Learn(Pass):
    """steps: of descent, for each block, a calibration batch each; rate: the first step, in spacings."""

    name: ClassVar[str] = "learn"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.annotated, Stage.observed)

    steps: int = 200
    rate: float = 0.005

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < 1:
            raise BitfoldError(f"learn takes 1 or more steps and a rate between 0 and 1, not {self}")

    def apply(self, gm: GraphModule) -> int:
        """Not on a graph of its own: the aim is the output of a model's block."""
        raise BitfoldError(f"{self.name} looks at a model's blocks: bf.quantize(..., algorithm=...)")


class Rounding:
    """One weight while its rounding is learned; `turned`: its input goes through a transform first."""

    def __init__(self, fmt: Format, draft: Draft, turned: bool = False) -> None:
        self.turned = turned
        self.format, self.params, self.weight = fmt, draft.chosen(fmt), draft.weight
        self.gap = spacing(fmt, self.params, draft.weight)
        values = draft.rounded(fmt)
        nearest = fmt.fake_quantize(draft.weight, self.params)
        # Where a solver rounded another way, just inside the numbers that round so, on the weight's side.
        inside = values + 0.49 * self.gap * (draft.weight - values).sign()
        self.place = torch.where(values == nearest, draft.weight, inside)
        self.best = self.place

    def values(self) -> Tensor:
        """The rounded weight as a leaf that gradients reach."""
        return self.format.fake_quantize(self.place, self.params).requires_grad_()

    def move(self, gradient: Tensor, rate: float) -> None:
        """A step against the sign of the gradient, within one spacing of the weight."""
        moved = self.place - rate * self.gap * gradient.sign()
        self.place = torch.minimum(torch.maximum(moved, self.weight - self.gap), self.weight + self.gap)

    def draft(self) -> Draft:
        """The best that was kept."""
        return Draft(self.weight, self.params, self.format.fake_quantize(self.best, self.params))
