"""Which specs a CPU kernel computes, and how a weight lies for it.

In: a spec; a format and the length of a row. Out: why not, or None; the format laid out.

    cpu_layout(format("int4[g64]"), 576)                    ->   int4[g64,planar64]
    cpu_layout(format("int4[g64]"), 576, format("int8"))    ->   int4[g64,planar64]
"""

from __future__ import annotations

from functools import lru_cache

from ...formats import Format, Integer, Planar
from ...formats.sparsity import Dense
from ..slices import Unwalkable
from ..spec import GemmSpec
from .body import walk_of

# Codes of a slice: a whole vector of bytes, and a line of the cache where that leaves little padding.
LENGTHS = (64, 32, 16)
# A sum of so many products of 8-bit integers fits in 32 bits.
MOST_INTEGERS = (2**31 - 1) // (255 * 128)
MOST_CODES = 1024


@lru_cache(maxsize=1024)
def cpu_layout(format: Format, k: int, activation: Format | None = None) -> Format | None:
    """`format` as CPU kernels walk over it, or None if they do not."""
    scale = format.scale
    if not isinstance(format.sparsity, Dense) or (scale is not None and scale.native) or k == 0:
        return None
    if format.element.bits == 8:
        return format.with_layout("bytes")
    bits = format.element.bits
    held = [f.cols for f in (format, activation) if f is not None]
    best: Format | None = None
    padding = 0.0
    for length in LENGTHS if activation is None else LENGTHS[:2]:
        span = length * 8 // (bits & -bits)
        if any(cols is not None and cols % length for cols in held) or span > MOST_CODES:
            continue
        waste = -(-k // span) * span / k
        if best is None or waste < padding - 0.02:
            best, padding = format.with_layout(Planar(span)), waste
    return best


def obstacle(spec: GemmSpec) -> str | None:
    """Why no CPU kernel computes the spec, or None."""
    weight, activation = spec.weight, spec.activation
    if not isinstance(weight.sparsity, Dense):
        return f"kernels read every number of a row; {weight} stores {weight.sparsity} of them"
    if weight.scale is not None and weight.scale.native:
        return f"kernels compute in float32; the arithmetic of {weight} is that of its input"
    if spec.experts:
        return "CPU kernels have no experts; call one for each"
    if activation is not None and activation.element != Integer(8):
        return f"CPU kernels multiply int8, not activations in {activation}; they are decoded"
    if activation is not None and not isinstance(weight.element, Integer):
        return f"{activation} is multiplied by integers, not by {weight.element.name}"
    if activation is not None and activation.scale is not None and activation.scale.dtype != "f32":
        return f"CPU kernels read scales of x in float32, not those of {activation}"
    grouped = sorted(spec.groups)
    if len(grouped) == 2 and grouped[1] % grouped[0]:
        return f"groups of {grouped[0]} and {grouped[1]} do not divide each other"
    found = walk_of(spec)
    if isinstance(found, Unwalkable):
        return found.reason
    if found.length % 16 or (activation is not None and found.length % 32):
        return f"slices of {found.length} codes fill no vector"
    if activation is not None and spec.k > MOST_INTEGERS:
        return f"a sum of {spec.k} products of 8-bit integers may not fit in 32 bits"
    return None
