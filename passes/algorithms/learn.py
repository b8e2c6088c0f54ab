"""Learn: which way each number is rounded, learned from what the whole block gives.

In: drafts of a block's weights. Out: numbers rounded up or down, and scales, so that the block's output is
nearest to the float block's.

    weight 0.45 in steps of 1: rounds to 0; a gradient that wants more moves it to 0.51, which rounds to 1

Rounding as something to learn is AdaRound's (Nagel et al., arXiv 2004.10568), a whole block's output as the
aim BRECQ's (Li et al., arXiv 2102.05426). How it is learned is AutoRound's (Cheng et al., "Optimize Weight
Rounding via Signed Gradient Descent", arXiv 2309.05516) but for the optimizer, which is Adam: each weight
moves in steps of a share of the format's spacing that falls to zero, and rounding passes the gradient
straight through. Scales move too. It starts from what the solvers before it have decided (`rounding.py`), and
the best weights that were seen are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...formats import BitfoldError
from .on_model import OnModel, Place


@dataclass(frozen=True)
class Learn(OnModel):
    """steps: of descent, for each block, a calibration batch each; rate: the first step, in spacings; scales:
    that of scales, as a share of themselves (0: they stay)."""

    name: ClassVar[str] = "learn"
    place: ClassVar[Place] = "block after"

    steps: int = 200
    rate: float = 0.002
    scales: float = 0.0005

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < 1 or not 0 <= self.scales < 1:
            raise BitfoldError(
                "learn takes 1 or more steps, a rate between 0 and 1, and one of scales from 0 to 1, not "
                f"{self}"
            )
