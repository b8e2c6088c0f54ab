"""smooth:k: the derivative of a staircase of tanh, steeper with k, of mean 1 over a step (DSQ, arXiv
1908.05033).

In: numbers in units of the element. Out: the gradient times the slope there.

    smooth:5 between two values:   0.07 at a value, 2.5 half way to the next
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cells import end_cells, neighbours, reach
from ..element import Element
from ..errors import FormatError
from .estimator import Back, Estimator


class Smooth(Estimator):
    """Much between two values, little at one."""

    name = "smooth"
    number = 5.0

    def check_number(self, number: float) -> None:
        """Above 100 a slope is 0 or beyond what is of use."""
        if not 0 < number <= 100:
            raise FormatError(f"the sharpness of a staircase is above 0 and at most 100, not {number!r}")

    def for_x(self, back: Back) -> Tensor:
        """By the slope."""
        assert back.number is not None
        return back.flow * staircase_slope(back.format.element, back.u, back.number)


def staircase_slope(element: Element, u: Tensor, sharpness: float) -> Tensor:
    """Derivative of the smooth staircase at u: k / 2 sech^2(k (f - 1/2)) / tanh(k / 2) where f is the way
    through the cell, which averages to 1 over it; 0 outside of the range. Up to half a cell beyond the ends,
    whose values are those ends', it is as wide as the cell within."""
    below, above = neighbours(element, u)
    first, last = end_cells(element)
    width = above - below
    way = (u - below) / torch.where(width == 0, 1.0, width)
    way = torch.where(u > element.high, (u - element.high) / last, way)
    way = torch.where(u < element.low, (element.low - u) / first, way)
    bend = torch.tanh(sharpness * (way - 0.5))
    slope = 0.5 * sharpness * (1.0 - bend * bend) / math.tanh(sharpness / 2)
    least, most = reach(element)
    return torch.where((u < least) | (u > most), 0.0, slope)
