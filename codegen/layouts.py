"""Which layout kernels want: units of 16 bits of a span that suits the format's groups and the row's length,
or bytes where x comes in 8-bit codes.

In: a format, the length of a row, the format of x. Out: the format laid out for kernels, or None if no layout
can serve.

    kernel_layout(format("int4[g128]"), 4096)                     ->   int4[g128,halves256]
    kernel_layout(format("int3[g128]"), 4096)                     ->   int3[g128,units256]
    kernel_layout(format("mxfp4"), 4096)                          ->   mxfp4[units128s9]
    kernel_layout(format("int4[g128]"), 4096, format("int8"))     ->   int4[g128,planar256]

Halfwords serve widths that divide 16; where they would cut codes into planes, and for floats whose sign
should lie where the decoded float has it, whole codes do (`formats/units.py`).
"""

from __future__ import annotations

from functools import lru_cache

from ..formats import Element, Float, Format, Layout, Planar
from ..formats.layout import Halfwords
from ..formats.sparsity import Dense
from ..formats.units import Units
from .decode import MANTISSA

# Codes of a slice: longer ones leave fewer runs to share, shorter ones load less than 128 bytes a row.
SHORTEST = 16
LENGTHS = (64, 32, SHORTEST)
LENGTHS_OF_BYTES = (128, 64, 32)
# Longer runs leave too few of them to share between programs (a row of 4096 is sixteen), and their loads do
# not fit the registers of two warps where a code lies in several planes: three bits spilled with 512.
MOST_CODES = 256


@lru_cache(maxsize=1024)
def kernel_layout(format: Format, k: int, activation: Format | None = None) -> Format | None:
    """`format` in the layout that kernels walk over, None if there is none: groups of no multiple of 16 (32
    for 8-bit activations), a stored sparsity, arithmetic that is not float32's."""
    scale = format.scale
    if not isinstance(format.sparsity, Dense) or (scale is not None and scale.native):
        return None
    bits = format.element.bits
    if activation is not None and bits == 8:
        return format.with_layout("bytes")
    best: Format | None = None
    padding = 0.0
    groups = [f.cols for f in (format, activation) if f is not None and f.cols is not None]
    for length in LENGTHS if activation is None else LENGTHS_OF_BYTES:
        if any(cols % length for cols in groups):
            continue
        span = length * (16 if activation is None else 8) // (bits & -bits)
        if span > MOST_CODES and length > SHORTEST:
            continue
        waste = -(-k // span) * span / k
        if best is None or waste < padding - 0.05:
            best, padding = format.with_layout(_spanning(format.element, span, activation)), waste
    return best


def _spanning(element: Element, span: int, activation: Format | None) -> Layout:
    bits = element.bits
    if activation is not None:
        return Planar(span)
    if isinstance(element, Float) and bits < 8:
        # As far apart as in bfloat16: the magnitude's bits end where its mantissa begins to be of no use.
        return Units(span, 15 - (MANTISSA["bf16"] - element.mantissa_bits))
    return Units(span) if bits & (bits - 1) else Halfwords(span)


def runs_on_kernels(layout: Layout) -> bool:
    """Whether codes in this layout were put there for these kernels."""
    return isinstance(layout, Halfwords | Units)
