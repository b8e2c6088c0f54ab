"""Codebooks: an arbitrary list of values, stored as the index.

In: floats in units of the scale. Out: the index of the nearest value; a tie goes to the smaller value.

    Codebook("ternary", (0.0, 1.0, -1.0))   2 bits, code 3 unused
    ternary.encode(tensor([-0.7, 0.5, 0.6]))  ->  [2, 0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .element import Element
from .errors import FormatError

# Up to this many values a code is found by comparing x with every boundary, which vectorizes.
_COMPARED = 16


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
        if len(order) > _COMPARED:
            rank = torch.bucketize(x, _constant(bounds, x), out_int32=True)
            return _constant(order, x).to(torch.uint8)[rank]
        # Each boundary below x adds the step to the next code, modulo 256.
        code = torch.full_like(x, order[0], dtype=torch.uint8)
        for bound, (below, above) in zip(bounds, pairwise(order), strict=True):
            passed = (x > bound).view(torch.uint8)
            code = code + (passed if above - below == 1 else passed * ((above - below) % 256))
        return code

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        # An unused code is never stored; it decodes to NaN so that a damaged file shows.
        return _constant(self.values(), codes).to(dtype)[codes.to(torch.int32)]


def _constant(values: Sequence[float], like: Tensor) -> Tensor:
    """A float32 table on `like`'s device, made by operators: a tensor constant would be lifted out of the
    graph when an exported program is decomposed, and torch 2.13 then fails to verify it."""
    return torch.cat([torch.full((1,), v, dtype=torch.float32, device=like.device) for v in values])


@lru_cache(maxsize=64)
def _boundaries(table: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Codes in order of value, and the float32 boundaries between neighbours.

    x is above the exact midpoint exactly when it is above the largest float32 not over it.
    """
    order = tuple(sorted(range(len(table)), key=table.__getitem__))
    bounds = []
    for lower, upper in pairwise(order):
        middle = (table[lower] + table[upper]) / 2
        bound = np.float32(middle)
        if float(bound) > middle:
            bound = np.nextafter(bound, np.float32(-math.inf))
        bounds.append(float(bound))
    return order, tuple(bounds)
