"""Codebooks: an arbitrary list of values, stored as the index.

In: floats in units of the scale. Out: the index of the nearest value; a tie goes to the smaller value.

    Codebook("ternary", (0.0, 1.0, -1.0))   2 bits, code 3 unused
    ternary.encode(tensor([-0.7, 0.5, 0.6]))  ->  [2, 0, 1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .element import Element
from .errors import FormatError

# Up to this many values a code is found by counting boundaries below x: compares and adds, which vectorize.
_COUNTING = 16


@dataclass(frozen=True)
class Codebook(Element):
    """`table[code]` is the value of a code; 2 to 256 different finite values. `rule` chooses the scale."""

    name: str
    table: tuple[float, ...]
    rule: str = "absmax"
    bits: int = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        table = tuple(float(np.float32(v)) for v in self.table)  # what decode yields, exactly
        if not 2 <= len(table) <= 256:
            raise FormatError(f"codebook {self.name!r} needs 2 to 256 values, not {len(table)}")
        if not all(math.isfinite(v) for v in table) or len(set(table)) != len(table):
            raise FormatError(f"the values of codebook {self.name!r} must be finite and all different")
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "bits", (len(table) - 1).bit_length())
        object.__setattr__(self, "low", min(table))
        object.__setattr__(self, "high", max(table))

    def values(self) -> tuple[float, ...]:
        return self.table + (math.nan,) * ((1 << self.bits) - len(self.table))

    def encode(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        order, bounds = _boundaries(self.table)
        if len(bounds) >= _COUNTING:
            rank = torch.bucketize(x, torch.tensor(bounds, dtype=torch.float32, device=x.device))
        else:
            rank = torch.zeros_like(x, dtype=torch.int32)
            for bound in bounds:
                rank = rank + (x > bound)
        if order == tuple(range(len(order))):
            return rank.to(torch.uint8)
        return torch.tensor(order, dtype=torch.uint8, device=x.device)[rank]

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        table = torch.tensor(self.values(), dtype=dtype, device=codes.device)
        return table[codes.to(torch.int32)]


@lru_cache(maxsize=64)
def _boundaries(table: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Codes in order of value, and the float32 boundaries between neighbours.

    x is above the exact midpoint exactly when it is above the largest float32 not over it.
    """
    order = tuple(sorted(range(len(table)), key=table.__getitem__))
    bounds = []
    for lower, upper in zip(order, order[1:], strict=False):
        middle = (table[lower] + table[upper]) / 2
        bound = np.float32(middle)
        if float(bound) > middle:
            bound = np.nextafter(bound, np.float32(-math.inf))
        bounds.append(float(bound))
    return order, tuple(bounds)
