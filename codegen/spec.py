"""What a fused kernel computes: `GemmSpec`. Its text is all that a graph, a file or a tuning table holds.

In: facts of a region. Out: a value that prints and parses.

    GemmSpec(format("int4[g128,halves512]"), n=4096, k=4096, x="bf16", bias=True)
    linear 4096x4096 bf16 int4[g128,bf16,halves512] bias

    y [M, n] = x [M, k] @ dequantize(parts) [n, k].T (+ bias [n]), sums in float32, rounded to x's dtype once
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import BitfoldError, Format, format
from .lanes import LANE_TYPES


class CodegenError(BitfoldError):
    """A kernel cannot be generated, or not for these tensors."""


@dataclass(frozen=True)
class GemmSpec:
    """weight [n, k] in a format, its layout included; x: bf16 or f16; bias [n] in x's dtype or none."""

    weight: Format
    n: int
    k: int
    x: str = "bf16"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.x not in LANE_TYPES:
            raise CodegenError(f"fused kernels take activations in {' or '.join(LANE_TYPES)}, not {self.x!r}")
        if self.n < 1 or self.k < 1:
            raise CodegenError(f"a weight of shape [{self.n}, {self.k}] has nothing to multiply")
        if self.n * self.k >= 2**31:
            raise CodegenError(
                f"a weight of shape [{self.n}, {self.k}] has 2**31 elements or more, past 32-bit addresses"
            )
        self.weight.check((self.n, self.k))

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and result."""
        return LANE_TYPES[self.x]

    def __str__(self) -> str:
        return f"linear {self.n}x{self.k} {self.x} {self.weight}" + (" bias" if self.bias else "")

    @classmethod
    def parse(cls, text: str) -> GemmSpec:
        """The inverse of `str`; CodegenError if the text says something else."""
        words = text.split(" ")
        kind, size = words[0], words[1].split("x") if len(words) > 1 else []
        known = kind == "linear" and len(words) in (4, 5) and len(size) == 2
        if not known or not all(s.isdecimal() for s in size) or words[4:] not in ([], ["bias"]):
            raise CodegenError(f"{text!r} is no kernel's text; one reads: linear 4096x4096 bf16 int8 bias")
        return cls(format(words[3]), int(size[0]), int(size[1]), words[2], bias=len(words) == 5)
