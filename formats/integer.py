"""Integers of 1 to 8 bits, two's complement or unsigned, optionally with fraction bits.

In: floats in units of the scale. Out: codes rounded to nearest even and saturated.

    Integer(4)                 int4    -8 .. 7
    Integer(4, signed=False)   uint4    0 .. 15
    Integer(8, fraction=6)     int8f6  -2 .. 1.984375   (the element of MXINT8: OCP MX 1.0, section 5.3.4)

A signed integer of one bit would be {-1, 0}, which no symmetric scale can use (the public library's symmetric
int1 yields nothing but zeros). The text name `int1` therefore means the sign bit {+1, -1}, a codebook;
`int1_twos` is the two's complement one, kept for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .element import Element
from .errors import FormatError


@dataclass(frozen=True)
class Integer(Element):
    """A `bits` wide integer whose value is the integer times 2**-fraction."""

    bits: int
    signed: bool = True
    fraction: int = 0
    name: str = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"an integer element has 1 to 8 bits, not {self.bits}")
        if not 0 <= self.fraction <= self.bits:
            raise FormatError(
                f"an integer of {self.bits} bits has 0 to {self.bits} fraction bits, not {self.fraction}"
            )
        name = f"{'int' if self.signed else 'uint'}{self.bits}"
        if self.signed and self.bits == 1:
            name += "_twos"
        if self.fraction:
            name += f"f{self.fraction}"
        unit = 2.0**-self.fraction
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "low", self.first * unit)
        object.__setattr__(self, "high", self.last * unit)

    @property
    def first(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def last(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def emax(self) -> int:
        """Exponent of the leading bit: 6 - fraction for int8."""
        return self.last.bit_length() - 1 - self.fraction

    @property
    def mantissa(self) -> int:
        return max(self.last.bit_length() - 1, 0)

    @property
    def steps(self) -> float:
        """Half the range: 127.5 for int8, 7.5 for int4; an unsigned one uses all of it for [0, max]."""
        return (self.high - self.low) / 2 if self.signed else self.high

    def values(self) -> tuple[float, ...]:
        unit = 2.0**-self.fraction
        count = 1 << self.bits
        return tuple((c if c <= self.last else c - count) * unit for c in range(count))

    def encode(self, x: Tensor) -> Tensor:
        if self.fraction:
            x = x * float(1 << self.fraction)
        # By way of int32 a NaN becomes 0 on x86 (its low byte), Arm and GPUs alike; the block's scale is NaN
        # then, so the block still decodes to NaN. int32 to uint8 keeps the low byte: two's complement.
        codes = torch.round(x).clamp(self.first, self.last).to(torch.int32).to(torch.uint8)
        return codes if self.bits == 8 or not self.signed else codes & ((1 << self.bits) - 1)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.signed:
            half = 1 << (self.bits - 1)
            # Sign extension in uint8 arithmetic, which wraps: (1111 ^ 1000) - 1000 = 11111111 = -1.
            codes = codes if self.bits == 8 else (codes ^ half) - half
            codes = codes.view(torch.int8)
        values = codes.to(dtype)
        return values * 2.0**-self.fraction if self.fraction else values

    def rounded(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """decode(encode(x)): a third of the instructions, which is what a training step pays for twice."""
        if self.fraction:
            x = x * float(1 << self.fraction)
        whole = torch.round(x).clamp(self.first, self.last)
        whole = torch.where(whole.isnan(), 0.0, whole + 0.0)  # as codes have it: no NaN, and no -0
        values = whole.to(dtype)
        return values * 2.0**-self.fraction if self.fraction else values
