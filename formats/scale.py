"""What multiplies a code: how many numbers share it, how it is stored, its zero point, how it is chosen.

In: nothing; this is data. Out: how stored scales become float32.

    Scale(Granularity(1, 128), "bf16")           a symmetric group scale
    Scale(Granularity(1, 32), "f16", "min")      Q4_1: value = code * scale + zero

The value of a code q under scale s and zero z:

    none    q * s
    int     (q - z) * s             z an integer of the element's own kind
    float   (q - middle) * s + z    middle = 8 for uint4 (tinygemm)
    min     q * s + z               z the smallest value (GGUF Q4_1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FormatError, nearest
from .granularity import Granularity

# Stored dtype of each scale dtype. E8M0 is kept as bytes: Inductor's C++ has no float8_e8m0fnu.
STORED = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e8m0": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}
ZEROS = ("none", "int", "float", "min")

# The smallest scale of each dtype: a block of zeros gets it, so that no scale is 0. For float32 and bfloat16
# the smallest normal (the public default eps; the reciprocal of a smaller one is infinite), for float16 the
# smallest subnormal (weights of 1e-4 need it), for e4m3 the smallest normal, as NVFP4 has it.
SMALLEST = {
    "f32": torch.finfo(torch.float32).tiny,
    "bf16": torch.finfo(torch.bfloat16).tiny,
    "f16": 2.0**-24,
    "e4m3": 2.0**-6,
}
LARGEST = {
    "f32": torch.finfo(torch.float32).max,
    "bf16": torch.finfo(torch.bfloat16).max,
    "f16": torch.finfo(torch.float16).max,
    "e4m3": 448.0,
}


@dataclass(frozen=True)
class Scale:
    """granularity; dtype: f32, bf16, f16, e8m0, e4m3; zero: none, int, float, min; rule: see `rules.py`;
    two_level: the block scales are themselves scaled by one float32 a tensor (NVFP4);
    native: arithmetic in the input's dtype, as the public affine primitives do, instead of float32."""

    granularity: Granularity
    dtype: str = "f32"
    zero: str = "none"
    rule: str = "absmax"
    two_level: bool = False
    native: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise FormatError(
                f"a scale is one of {', '.join(STORED)}, not {self.dtype!r}{nearest(self.dtype, STORED)}"
            )
        if self.zero not in ZEROS:
            raise FormatError(f"a zero point is one of {', '.join(ZEROS)}, not {self.zero!r}")
        if self.zero != "none" and self.dtype in ("e8m0", "e4m3"):
            raise FormatError(f"{self.dtype} scales have no zero point; use f32, bf16 or f16 scales with one")
        if self.two_level and self.dtype != "e4m3":
            raise FormatError(f"two levels are for e4m3 scales, not {self.dtype}")

    @property
    def stored(self) -> torch.dtype:
        """torch dtype of the scales part."""
        return STORED[self.dtype]

    @property
    def bits(self) -> int:
        """Bits of one stored scale."""
        return self.stored.itemsize * 8

    def decode(self, scales: Tensor) -> Tensor:
        """Stored scales -> float32."""
        return e8m0_value(scales) if self.dtype == "e8m0" else scales.to(torch.float32)

    def store(self, scales: Tensor) -> Tensor:
        """Scales in any float dtype -> stored ones, never 0 and never infinite. Not for e8m0, see `rules.py`.

        A NaN stays NaN, so that a block with a NaN in it decodes to NaN.
        """
        scales = scales.to(torch.float32)
        bounded = torch.where(
            scales < 0,
            scales.clamp(-LARGEST[self.dtype], -SMALLEST[self.dtype]),
            scales.clamp(SMALLEST[self.dtype], LARGEST[self.dtype]),
        )
        # An infinite magnitude must poison its block rather than turn it into a finite one.
        return torch.where(scales.isinf(), math.nan, _rounded(bounded, self.dtype)).to(self.stored)


def _rounded(x: Tensor, dtype: str) -> Tensor:
    """float32 numbers rounded to nearest even at the precision of a half-precision dtype, still as float32.

    Inductor drops the rounding of a cast to bfloat16 or float16 and back inside a fused kernel; codes would
    then be computed from another scale than the one that is stored. After this the cast has nothing left to
    round.
    """
    if dtype not in ("bf16", "f16"):
        return x
    raw = x.view(torch.int32)
    cut = 16 if dtype == "bf16" else 13
    rounded = (raw + ((1 << (cut - 1)) - 1) + ((raw >> cut) & 1)) & -(1 << cut)
    normal = torch.where(x.isnan(), x, rounded.view(torch.float32))
    if dtype == "bf16":
        return normal
    # Subnormal in float16: adding 0.5 makes the adder round at 2**-24.
    subnormal = torch.where(x < 0, (x - 0.5) + 0.5, (x + 0.5) - 0.5)
    return torch.where(x.abs() < 2.0**-14, subnormal, normal)


def e8m0_value(stored: Tensor) -> Tensor:
    """E8M0 bytes -> float32 2**(byte - 127); 255 is NaN (OCP MX 1.0, section 5.4.1)."""
    byte = stored.to(torch.int32)
    raw = torch.where(byte == 0, 0x00400000, byte << 23)  # 2**-127 is a float32 subnormal
    return torch.where(byte == 255, 0x7FC00000, raw).view(torch.float32)


def e8m0_reciprocal(stored: Tensor) -> Tensor:
    """E8M0 bytes -> float32 2**(127 - byte), exactly; 255 is NaN."""
    byte = stored.to(torch.int32)
    raw = torch.where(byte == 254, 0x00400000, (254 - byte) << 23)
    return torch.where(byte == 255, 0x7FC00000, raw).view(torch.float32)
