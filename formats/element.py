"""What one stored number can be: a few bits, and the value of every bit pattern.

In: a float tensor in the element's own units (already divided by the scale). Out: its codes, and back.
A code is the raw bit pattern in the low `bits` bits of a uint8.

    Integer(4).encode(tensor([-1.2, 9.0]))  ->  tensor([0xF, 0x7], dtype=uint8)  ->  decode: [-1., 7.]

The three kinds are in `integer.py`, `floating.py` and `codebook.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Element(ABC):
    """One number's bits. Concrete elements are frozen dataclasses and carry these four fields.

    name: how the text form spells it; bits: width of a code, 1 to 8;
    low, high: smallest and largest finite value.
    """

    name: str
    bits: int
    low: float
    high: float

    @abstractmethod
    def values(self) -> tuple[float, ...]:
        """The value of every code 0 .. 2**bits - 1; NaN for a code that means no number."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Float tensor -> uint8 codes of the same shape: nearest value, saturating."""

    @abstractmethod
    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 codes -> values in `dtype`."""

    def rounded(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """decode(encode(x)), bit for bit; an element that can do without the codes has its own."""
        return self.decode(self.encode(x), dtype)

    @property
    def reach(self) -> float:
        """The largest magnitude that both signs can have: 7 for int4, 448 for float8_e4m3fn."""
        return min(-self.low, self.high) if self.low < 0 else self.high

    @property
    def emax(self) -> int:
        """Exponent of the largest value, as the OCP MX specification uses it (8 for float8_e4m3fn)."""
        return math.floor(math.log2(self.high))

    @property
    def mantissa(self) -> int | None:
        """Bits after the leading one near the largest value, where the idea has a meaning."""
        return None

    @property
    def rule(self) -> str:
        """How a scale for this element is chosen unless the format says otherwise."""
        return "absmax"

    @property
    def steps(self) -> float:
        """What the largest magnitude of a block is divided by under the rule `absmax`."""
        return max(-self.low, self.high)

    def __str__(self) -> str:
        return self.name
