"""Small floats: any split of up to 8 bits into sign, exponent and mantissa.

In: floats in units of the scale. Out: codes rounded to nearest even, saturated at the largest finite value.

    Float(4, 3, "fn")   float8_e4m3fn   bias 7, S1111111 is NaN, largest 448      (OCP FP8)
    Float(5, 2)         float8_e5m2     bias 15, infinities and NaN, largest 57344 (OCP FP8)
    Float(2, 1)         float4_e2m1     0 .5 1 1.5 2 3 4 6 and their negatives     (OCP MX)

Below 8 bits there are no infinities and no NaN. At 8 bits the ending says what the top codes mean: nothing =
IEEE, `fn` = finite with one NaN a sign, `fnuz` = finite, one NaN in the place of -0, bias one higher.
Saturation follows the OCP FP8 table for saturating conversion: infinity becomes the largest finite value.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .element import Element
from .errors import FormatError

_NAME = re.compile(r"float([2-8])_e(\d)m(\d)(?:b(\d+))?(fnuz|fn)?")


@dataclass(frozen=True)
class Float(Element):
    """A sign bit, `exponent` bits and `mantissa_bits` bits; `ending`, '', 'fn' or 'fnuz', is for 8 bits."""

    exponent: int
    mantissa_bits: int
    ending: str = ""
    bias: int = -1  # -1: what the ending implies
    name: str = field(init=False)
    bits: int = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        e, m, ending = self.exponent, self.mantissa_bits, self.ending
        bits = 1 + e + m
        if e < 1 or m < 0 or bits > 8:
            raise FormatError(
                "a float element is a sign, 1 or more exponent bits and 0 or more mantissa bits, at most"
                f" 8 bits together, not e{e}m{m}"
            )
        if ending not in ("", "fn", "fnuz"):
            raise FormatError(f"a float's ending is '', 'fn' or 'fnuz', not {ending!r}")
        if bits < 8 and ending == "fnuz":
            raise FormatError(f"'fnuz' is for 8-bit floats; float{bits}_e{e}m{m} has no NaN")
        if bits == 8 and ending == "" and (e < 2 or m < 1):
            raise FormatError(f"float8_e{e}m{m} has no room for infinity and NaN; write float8_e{e}m{m}fn")
        usual = (1 << (e - 1)) - (0 if ending == "fnuz" else 1)
        bias = usual if self.bias == -1 else self.bias
        if not 0 <= bias <= 100:
            raise FormatError(f"a float element's bias is 0 to 100, not {bias}")
        object.__setattr__(self, "ending", ending if bits == 8 else "")
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "bits", bits)
        odd_bias = f"b{bias}" if bias != usual else ""
        object.__setattr__(self, "name", f"float{bits}_e{e}m{m}{odd_bias}{self.ending}")
        high = max(v for v in self.values() if math.isfinite(v))
        object.__setattr__(self, "high", high)
        object.__setattr__(self, "low", -high)

    @classmethod
    def parse(cls, name: str) -> Float | None:
        """The float that `name` spells, or None if it spells none."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        bits, e, m, bias, ending = found.groups()
        if 1 + int(e) + int(m) != int(bits):
            raise FormatError(
                f"{name!r} does not add up: 1 sign + {e} exponent + {m} mantissa bits are"
                f" {1 + int(e) + int(m)}, not {bits}"
            )
        return cls(int(e), int(m), ending or "", -1 if bias is None else int(bias))

    @property
    def mantissa(self) -> int:
        return self.mantissa_bits

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype with the same bits, where there is one that can be cast."""
        return _TORCH.get(self.name)

    def values(self) -> tuple[float, ...]:
        return _values(self.exponent, self.mantissa_bits, self.bits, self.bias, self.ending)

    def encode(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        if self.torch_dtype is not None:
            return x.clamp(self.low, self.high).to(self.torch_dtype).view(torch.uint8)  # clamp keeps NaN
        m, top = self.mantissa_bits, self.bits - 1
        raw = x.view(torch.int32)
        # Saturation, as integers: NaN is above infinity. Without a NaN of its own a float takes the largest
        # value for one, as the satfinite conversions of GPUs do.
        magnitude = (raw & 0x7FFFFFFF).clamp(max=_float32_bits(self.high))
        # Two roundings to nearest even, one below the smallest normal and one above, each held at it outside
        # its own half, so that their sum counts both (torch.where is ten times slower than a clamp on a CPU).
        exponent = 127 + 1 - self.bias
        smallest = exponent << 23
        # Below: adding 2**(23 + exponent of the last bit) makes the adder round at that bit.
        magic = (exponent + 23 - m) << 23
        below = magnitude.clamp(max=smallest).view(torch.float32) + math.ldexp(1.0, 23 + 1 - self.bias - m)
        below = below.view(torch.int32) - magic
        above = magnitude.clamp(min=smallest)
        shift = 23 - m
        above = (above + ((above >> shift) & 1) + ((1 << (shift - 1)) - 1)) >> shift
        code = below + above - (exponent << m)
        code = code | ((raw >> (31 - top)) & (1 << top))
        if self.ending == "fnuz":
            code = torch.where(code == 1 << top, 0, code)  # there is no -0
        if self.bits == 8:
            code = torch.where(x.isnan(), self._nan_code, code)
        return code.to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.torch_dtype is not None:
            return codes.view(self.torch_dtype).to(dtype)
        m, top = self.mantissa_bits, self.bits - 1
        wide = codes.to(torch.int32)
        exponent = (wide >> m) & ((1 << self.exponent) - 1)
        # (fraction + hidden one) * 2**(exponent - bias - m): no float32 subnormal on the way, so a processor
        # that flushes them agrees.
        digits = (wide & ((1 << m) - 1)) + (exponent.clamp(max=1) << m)
        unit = ((exponent.clamp(min=1) + (127 - self.bias - m)) << 23).view(torch.float32)
        value = digits.to(torch.float32) * unit
        value = (value.view(torch.int32) | ((wide >> top) << 31)).view(torch.float32)
        if self.bits == 8:
            value = self._special(wide, value)
        return value.to(dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """decode(encode(x)). Below 8 bits without codes: to a multiple of the last bit's value where x is."""
        if self.bits == 8 or self.mantissa_bits == 0:  # without a mantissa the exponent decides what is even
            return self.decode(self.encode(x), dtype)
        raw = x.to(torch.float32).view(torch.int32)
        magnitude = (raw & 0x7FFFFFFF).clamp(max=_float32_bits(self.high))
        # The exponent of x, or that of the smallest normal; less the mantissa's bits it is a unit's.
        unit = (magnitude & 0x7F800000).clamp(min=(128 - self.bias) << 23) - (self.mantissa_bits << 23)
        inverse = ((254 << 23) - unit).view(torch.float32)
        value = torch.round(magnitude.view(torch.float32) * inverse) * unit.view(torch.float32)
        return (value.view(torch.int32) | (raw & -0x80000000)).view(torch.float32).to(dtype)

    @property
    def _nan_code(self) -> int:
        """The code of NaN, for 8 bits."""
        if self.ending == "fnuz":
            return 0x80
        if self.ending == "fn":
            return 0x7F
        return 0x7F ^ ((1 << (self.mantissa_bits - 1)) - 1)  # quiet: only the top mantissa bit

    def _special(self, wide: Tensor, value: Tensor) -> Tensor:
        if self.ending == "fnuz":
            return torch.where(wide == 0x80, math.nan, value)
        if self.ending == "fn":
            return torch.where(wide & 0x7F == 0x7F, math.nan, value)
        top = wide & 0x7F
        infinity = 0x7F ^ ((1 << self.mantissa_bits) - 1)
        value = torch.where(top == infinity, value.sign() * math.inf, value)
        return torch.where(top > infinity, math.nan, value)


def _float32_bits(value: float) -> int:
    """The bit pattern of a float32."""
    return int.from_bytes(struct.pack("<f", value), "little")


@lru_cache(maxsize=256)
def _values(e: int, m: int, bits: int, bias: int, ending: str) -> tuple[float, ...]:
    values: list[float] = []
    for code in range(1 << bits):
        exponent, fraction = (code >> m) & ((1 << e) - 1), code & ((1 << m) - 1)
        hidden = 1 if exponent else 0
        value = math.ldexp(fraction + (hidden << m), max(exponent, 1) - bias - m)
        top = code & 0x7F
        if (bits == 8 and ending == "fnuz" and code == 0x80) or (
            bits == 8 and ending == "fn" and top == 0x7F
        ):
            value = math.nan
        elif bits == 8 and ending == "" and exponent == (1 << e) - 1:
            value = math.nan if fraction else math.inf
        values.append(-value if code >> (bits - 1) else value)
    return tuple(values)


_TORCH = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}
