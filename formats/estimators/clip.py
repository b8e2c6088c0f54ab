"""clip: the gradient goes through where a number lies in the range of the codes.

In: numbers in units of the element. Out: the gradient where they round without being cut off, else 0.

    int4, from -8 to 7:   dv/dx = 1 from -8.5 to 7.5 (and 2**-8 of that beyond: `cells.reach`), else 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import reach
from ..format import Format
from .estimator import Back, Estimator, Kernel


class Clip(Estimator):
    """1 within reach of a code, else 0."""

    name = "clip"

    def for_x(self, back: Back) -> Tensor:
        """What lies within."""
        least, most = reach(back.format.element)
        return torch.where(~((back.u < least) | (back.u > most)), back.flow, 0.0)

    def kernel(self, fmt: Format, number: float | None) -> Kernel:
        """The same."""
        least, most = reach(fmt.element)
        return Kernel(
            "tl.where(outside, 0.0, g)",
            lines=(f"below = u < {least!r}", f"above = u > {most!r}", "outside = below | above"),
        )
