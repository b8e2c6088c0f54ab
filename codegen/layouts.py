"""Which layout kernels want: halfwords of a span that suits the format's groups and the row's length.

In: a format and the length of a row. Out: the format laid out for kernels, or None if no layout can serve.

    kernel_layout(format("int4[g128]"), 4096)   ->   int4[g128,halves256]
"""

from __future__ import annotations

from functools import lru_cache

from ..formats import Format, Layout
from ..formats.layout import Halfwords
from ..formats.sparsity import Dense

# Codes of a slice: longer ones leave fewer runs to share, shorter ones load less than 128 bytes a row.
LONGEST = 64
SHORTEST = 16
# Longer runs leave too few of them to share between programs (a row of 4096 is sixteen), and their loads do
# not fit the registers of two warps where a code lies in several planes: three bits spilled with 512.
MOST_CODES = 256


@lru_cache(maxsize=1024)
def kernel_layout(format: Format, k: int) -> Format | None:
    """`format` in the layout that kernels walk over, None if there is none: groups of no multiple of 16, a
    stored sparsity, arithmetic that is not float32's."""
    scale = format.scale
    if not isinstance(format.sparsity, Dense) or (scale is not None and scale.native):
        return None
    cols = scale.granularity.cols if scale is not None else None
    bits = format.element.bits
    narrowest = bits & -bits
    best: Format | None = None
    padding = 0.0
    for length in (LONGEST, 32, SHORTEST):
        if cols is not None and cols % length:
            continue
        span = length * 16 // narrowest
        if span > MOST_CODES and length > SHORTEST:
            continue
        waste = -(-k // span) * span / k
        if best is None or waste < padding - 0.05:
            best, padding = format.with_layout(Halfwords(span)), waste
    return best


def runs_on_kernels(layout: Layout) -> bool:
    """Whether codes in this layout were put there for these kernels."""
    return isinstance(layout, Halfwords)
