"""Which specs a CPU kernel computes, and how a weight lies for it.

In: a spec; a format and the length of a row. Out: why not, or None; the format laid out.

    cpu_layout(format("int4[g64]"), 576, vectors=VECTORS["avx512vnni"])     ->   int4[g64,planar64]
    cpu_layout(format("int4[g64]"), 4096, vectors=VECTORS["avx512vnni"])    ->   int4[g64,planar128]
    cpu_layout(format("int4[g64]"), 4096, vectors=VECTORS["avx2"])          ->   int4[g64,lanes.planar64]
"""

from __future__ import annotations

from functools import lru_cache

from ...formats import Format, Integer, Layout, Planar
from ...formats.group_lanes import GROUPS, GroupLanes
from ...formats.spare import Spare
from ...formats.sparsity import Dense
from ..slices import Unwalkable
from ..spec import GemmSpec
from .body import walk_of
from .values import multiples
from .vectors import Vectors, widest

# Codes of a slice: a whole vector of bytes, and a line of the cache where that leaves little padding.
LENGTHS = (64, 32, 16)
# A sum of so many products of 8-bit integers fits in 32 bits.
MOST_INTEGERS = (2**31 - 1) // (255 * 128)
MOST_CODES = 1024
# Numbers of a group that may lie beside others: fewer fill no run, more are as well on their own, and have no
# memory set aside (kLongest of headers/kernel.h is the same number).
SHORTEST, LONGEST = 16, 128
# Of a row that padding may add, where groups lie side by side.
PADDING = 0.03


def cpu_layout(
    format: Format, k: int, activation: Format | None = None, *, vectors: Vectors | None = None
) -> Format | None:
    """`format` as CPU kernels of these vectors (None: this processor's) walk over it; None if they do not."""
    return _laid_out(format, k, activation, vectors or widest())


@lru_cache(maxsize=1024)
def _laid_out(format: Format, k: int, activation: Format | None, vectors: Vectors) -> Format | None:
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
            best, padding = format.with_layout(_of_span(bits, span)), waste
    found = side_by_side(format, activation) if vectors.lanes else None
    if found is not None and -(-k // found.span(format.run)) * found.span(format.run) / k <= 1 + PADDING:
        return format.with_layout(found)
    return best


def side_by_side(format: Format, activation: Format | None = None) -> GroupLanes | None:
    """The layout of eight groups side by side, of a format whose kernels multiply small integers by digits
    or by int8, in groups that it can be made of; else None."""
    cols, bits = format.cols, format.element.bits
    small = isinstance(format.element, Integer) or (
        activation is None and multiples(format.element) is not None
    )
    whole = activation is None or activation.cols is None
    if not small or not whole or bits == 8 or cols is None or not SHORTEST <= cols <= LONGEST:
        return None
    span = 32 * 8 // (bits & -bits)
    return GroupLanes(_of_span(bits, span)) if cols * GROUPS % span == 0 else None


def _of_span(bits: int, span: int) -> Layout:
    return Spare(span) if bits in (3, 7) else Planar(span)


def obstacle(spec: GemmSpec, vectors: Vectors | None = None) -> str | None:
    """Why no CPU kernel of these vectors (None: this processor's) computes the spec, or None."""
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
    if isinstance(weight.layout, GroupLanes):
        if (elsewhere := of_another(spec, vectors or widest())) is not None:
            return elsewhere
        if side_by_side(weight, activation) is None:
            return f"kernels read no groups of {weight} side by side"
    found = walk_of(spec)
    if isinstance(found, Unwalkable):
        return found.reason
    if found.length % 16 or (activation is not None and found.length % 32):
        return f"slices of {found.length} codes fill no vector"
    if activation is not None and spec.k > MOST_INTEGERS:
        return f"a sum of {spec.k} products of 8-bit integers may not fit in 32 bits"
    return None


def of_another(spec: GemmSpec, vectors: Vectors) -> str | None:
    """What to do about a weight that lies as kernels of these vectors never read it, or None."""
    if vectors.lanes or not isinstance(spec.weight.layout, GroupLanes):
        return None
    return (
        f"kernels of {vectors} read no groups side by side, as in {spec.weight}, which was laid out for "
        "another processor; bf.load a file of bf.save here, or quantize the model again here"
    )
