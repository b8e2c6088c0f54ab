"""pact: a learned end of the range (PACT, arXiv 1805.06085), for both signs.

In: numbers in units of the element. Out: their gradients within the range, and that of its `end`.

    uint4, end 1.5:   dv/dx = 1 from 0 to 1.5, else 0;   dv/dend = 1 above, 0 elsewhere
    int4 has a sign:  dv/dend = -8 / 7 below, too

The end stands for the largest value of the element, or, where that is 0 or less, for the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import learned
from ..element import Element
from ..errors import FormatError
from ..format import Format
from .estimator import Back, Estimator, Kernel


class Pact(Estimator):
    """A learned end."""

    name = "pact"
    learns = ("end",)

    def check(self, fmt: Format) -> None:
        """Nor does it learn two ends."""
        super().check(fmt)
        if fmt.scale is not None and fmt.scale.zero != "none":
            raise FormatError(f"pact learns one end of a range, and {fmt} has a zero point; take 'lsq'")

    def start(self, fmt: Format, scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Where the range of the scales ends."""
        return (learned.learned(fmt, scales)[0] * _end(fmt.element),)

    def scales(self, fmt: Format, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Those whose range ends there."""
        return learned.stored(fmt, (held[0] / _end(fmt.element),))

    def for_x(self, back: Back) -> Tensor:
        """What lies within."""
        return torch.where(back.below | back.above, 0.0, back.flow)

    def for_held(self, back: Back) -> tuple[Tensor, ...]:
        """See the file."""
        low, high = _by_end(back.format.element)
        return (back.flow * torch.where(back.above, high, torch.where(back.below, low, 0.0)),)

    def kernel(self, fmt: Format, number: float | None) -> Kernel:
        """The same."""
        low, high = _by_end(fmt.element)
        lines = (
            f"below = u <= {float(fmt.element.low)!r}",
            f"above = u >= {float(fmt.element.high)!r}",
            "outside = below | above",
            f"by = tl.where(above, {high!r}, tl.where(below, {low!r}, 0.0))",
        )
        return Kernel("tl.where(outside, 0.0, g)", ("g * by",), lines)


def _end(element: Element) -> float:
    return element.high if element.high > 0 else -element.low


def _by_end(element: Element) -> tuple[float, float]:
    """How the smallest and the largest value move with the end."""
    return element.low / _end(element), element.high / _end(element)
