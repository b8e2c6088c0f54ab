"""lsq: a learned step (LSQ, arXiv 1902.08153), and, for formats with a zero point, a learned smallest value
(LSQ+, 2004.09576).

In: numbers, and what they are rounded to. Out: their gradients within the range, which ends at the smallest
and the largest value, and those of `step` and `low`.

    dv/dx = 1 inside, else 0;   dv/dstep = (v - x) / step inside, else the code;   dv/dlow = 0 inside, else 1

The last two are multiplied by 1 / sqrt(N Qp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..format import Format
from .estimator import Back, Estimator, Kernel


class Lsq(Estimator):
    """A learned step, and where the range begins."""

    name = "lsq"
    learns = ("step", "low")
    by_item = True

    def names(self, fmt: Format) -> tuple[str, ...]:
        """`low` only where a zero point is stored."""
        return self.learns if fmt.scale is not None and fmt.scale.zero != "none" else self.learns[:1]

    def for_x(self, back: Back) -> Tensor:
        """What lies within."""
        return torch.where(back.below | back.above, 0.0, back.flow)

    def for_held(self, back: Back) -> tuple[Tensor, ...]:
        """See the file."""
        outside = back.below | back.above
        by_step = torch.where(outside, back.value - back.low, back.value - back.numbers) / back.step
        for_step = back.flow * by_step
        if len(back.held) == 1:
            return (for_step,)
        return for_step, torch.where(outside, back.flow, 0.0)

    def factor(self, back: Back) -> Any:
        """1 / sqrt(N Qp): N numbers share a step, or make up one item of the batch. Qp is the largest value,
        but at least 1: an element may end below (int2f1) or at 0, where the paper's factor is large or
        none."""
        x, step = back.x, back.held[0]
        count = x.numel() // x.shape[0] if back.item and x.ndim > 1 else x.numel() // step.numel()
        # A number where sizes are known, else a symbol.
        return 1.0 / torch.sym_sqrt(max(back.format.element.high, 1.0) * count)

    def kernel(self, fmt: Format, number: float | None) -> Kernel:
        """The same; a step that is stored as 0 divides as 1."""
        zero = len(self.names(fmt)) == 2
        lines = (
            f"below = u <= {float(fmt.element.low)!r}",
            f"above = u >= {float(fmt.element.high)!r}",
            "outside = below | above",
            f"by = tl.where(outside, value - {'least' if zero else '0.0'}, value - v)",
            "one = tl.full(step.shape, 1.0, tl.float32)",
            "by = by * tl.div_rn(one, tl.where(step == 0.0, 1.0, step))[:, None]",
        )
        for_low = ("tl.where(outside, g, 0.0)",) if zero else ()
        return Kernel("tl.where(outside, 0.0, g)", ("g * by", *for_low), lines)
