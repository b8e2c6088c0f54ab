"""The two values of an element that a number lies between: what stochastic rounding and smooth steps need.

In: numbers in units of the element. Out: the neighbours below and above; the same value twice for a number
outside of the element's range.

    int4:         2.3  ->  2, 3          9.0  ->  7, 7
    float4_e2m1:  2.3  ->  2, 3          3.5  ->  3, 4
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codebook import _constant
from .element import Element
from .format import Format
from .integer import Integer
from .learned import units


def neighbours(element: Element, u: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value not above u, and the next one; float32."""
    inside = u.clamp(element.low, element.high)
    if isinstance(element, Integer):
        unit = 2.0**-element.fraction
        below = torch.floor(inside / unit) * unit
        return below, torch.where(u > element.low, below + unit, below).clamp(max=element.high)
    values = sorted({value for value in element.values() if math.isfinite(value)})
    table = _constant(values, u)
    above = torch.bucketize(inside, table, right=True).clamp(1, len(values) - 1)
    low, high = table[above - 1], table[above]
    # On the last value and beyond both ends there is one neighbour.
    return torch.where(u >= element.high, high, low), torch.where(u <= element.low, low, high)


def dithered(fmt: Format, x: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """x moved within its cell so that rounding to nearest rounds up with probability (x - below) / width.

    Uniform noise of one cell's width, cut at the cell's ends: float32, in x's shape.
    """
    u, step, low = units(fmt, x, params)
    below, above = neighbours(fmt.element, u)
    moved = u + (above - below) * (torch.rand_like(u) - 0.5)
    moved = torch.where(above > below, torch.minimum(torch.maximum(moved, below), above), u)
    first = fmt.element.first if isinstance(fmt.element, Integer) and _has_low(fmt) else 0
    return ((moved - first) * step + low).reshape(x.shape)


def reach(element: Element) -> tuple[float, float]:
    """What rounding to nearest takes in: half of a cell beyond the smallest and the largest value. 2**-8
    more, since a scale that is stored with 8 bits of mantissa may be that much too small for the number that
    chose it."""
    first, last = end_cells(element)
    slack = 1.0 + 2.0**-8
    return (element.low - first / 2) * slack, (element.high + last / 2) * slack


def end_cells(element: Element) -> tuple[float, float]:
    """Widths of the lowest and the highest cell."""
    values = sorted({value for value in element.values() if math.isfinite(value)})
    return values[1] - values[0], values[-1] - values[-2]


def _has_low(fmt: Format) -> bool:
    return fmt.scale is not None and fmt.scale.zero != "none"
