"""How the CPU target multiplies by codes: torch that Inductor turns into one loop over the codes' bytes.

In: x [M, K] with a small fixed M, the parts of a weight [N, K], its format. Out: float32 [M, N].

    F.linear(x, dequantize(codes, scales))       writes N*K floats to memory in every call, then reads them
    ->  for each piece of a run of codes:        reads N*K/2 bytes, once for all M rows of x
        ((codes >> shift & mask) * scale * x[m, piece]), summed over the run

A piece is a stretch of codes that one shift and one mask take out of contiguous bytes; pieces come from the
layout's index map, values from the element and the scale, so no format is named here. The weights are bit for
bit those of `dequantize`; only the order of the sum differs (see `tolerance.py`).

What each form takes is a run of `benchmarks/cpu_forms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import pairwise

import torch
from torch import Tensor

from ...formats import Element, Format, Granularity, Integer, Planar, Scale, affine, mover
from ...formats.sparsity import Dense
from ...passes import Miss
from .values import Decoded, terms

# A piece shorter than a vector register (16 float32 with AVX-512) leaves lanes empty.
LANES = 16
# More pieces than this a run, and the loop body spills registers and takes long to compile.
MOST_PIECES = 32
# Rows of x that share one pass over the codes; each has its own accumulator in a register.
MOST_ROWS = 8


@dataclass(frozen=True)
class Piece:
    """`count` codes from `code` on in a run, all of its scale group `group`, and how to take them out."""

    code: int
    count: int
    group: int
    moves: tuple[mover.Move, ...]


@dataclass(frozen=True)
class Plan:
    """A row as runs of `codes` codes in `bytes` bytes with `groups` scales each, cut into equal pieces."""

    codes: int
    bytes: int
    groups: int
    pieces: tuple[Piece, ...]


@lru_cache(maxsize=512)
def plan(format: Format, k: int) -> Plan | Miss:
    """How to walk over a row of `k` codes in this format, or why that cannot be done in vectors."""
    if not isinstance(format.sparsity, Dense):
        return Miss(f"{format} stores only some of a row's numbers")
    if k == 0:
        return Miss("a row without numbers has nothing to sum")
    bits, run = format.element.bits, format.run
    period, _ = format.layout.period(bits, run, k)
    codes = math.lcm(period, run) if run else (k if period == 1 else period)
    if codes >= 2 * k:
        return Miss(f"a run of {codes} codes is mostly padding in a row of {k}")
    size = format.layout.row_bytes(bits, run, codes)
    pieces = tuple(_pieces(mover.moves(format.layout, bits, run, codes, size), run or codes))
    if len({piece.count for piece in pieces}) != 1:
        return Miss(f"the layout {format.layout} of {format} cuts a run of {codes} codes into unequal pieces")
    if len(pieces) > MOST_PIECES or (pieces[0].count < LANES and len(pieces) > 1):
        return Miss(
            f"the layout {format.layout} of {format} cuts a run of {codes} codes into {len(pieces)} pieces "
            f"of {pieces[0].count}, too short for vectors"
        )
    return Plan(codes, size, codes // run if run else 1, pieces)


def _pieces(moved: mover.Moves, group: int) -> list[Piece]:
    """The intervals of a run, cut at the ends of scale groups too."""
    found = []
    for interval in moved.by_code:
        start, count = interval[0].code, interval[0].count
        edges = [start, *range((start // group + 1) * group, start + count, group), start + count]
        for a, b in pairwise(edges):
            ahead = a - start
            cut = (mover.Move(a, m.byte + ahead, b - a, m.low, m.bit, m.width) for m in interval)
            found.append(Piece(a, b - a, a // group, tuple(cut)))
    return found


def vector_layout(format: Format, k: int) -> Planar | None:
    """The planar layout whose pieces fill a vector register; None when one code a byte is as good.

    Its span is the shortest multiple of the group that does so: 32 codes for 4 bits, 128 for 3 bits (2 + 1).
    """
    bits = format.element.bits
    if bits == 8:
        return None
    narrowest = bits & -bits
    for span in (None, math.lcm(format.run or 1, LANES * 8 // narrowest)):
        layout = Planar(span)
        if plan(format.with_layout(layout), k):
            return layout
    return None


def gemv(x: Tensor, parts: Sequence[Tensor], format: Format, walk: Plan) -> Tensor:
    """x [M, K] of any float dtype times the weight [N, K] of these parts, transposed: [M, N] float32.

    M is unrolled: call it with a small fixed one.
    """
    weights = _weights(parts, format, walk)
    rows = _runs_of(x, walk)
    out = []
    for m in range(x.shape[0]):
        products = [_part(rows[m], piece) * weight for piece, weight in weights]
        if isinstance(format.element, Integer):
            out.append(reduce(torch.add, products).sum((-2, -1)))
        else:  # each piece takes too many operations for Inductor to keep several in one sum
            out.append(reduce(torch.add, [product.sum((-2, -1)) for product in products]))
    return torch.stack(out)


def _weights(parts: Sequence[Tensor], format: Format, walk: Plan) -> list[tuple[Piece, Tensor]]:
    """Pieces with their values in every run, float32 [N, runs, count]; a piece's terms sum to the weights."""
    packed, scale = parts[0], format.scale
    rows = packed.shape[0]
    runs = packed.reshape(rows, -1, walk.bytes)
    params = [_settled(part) for part in parts[1:]]
    if scale is not None and scale.dtype == "e8m0":  # a dozen operations, which the loop need not repeat
        params[0], scale = _in_memory(scale.decode(params[0])), replace(scale, dtype="f32")
    params = [_grouped(param, format, rows, walk) for param in params]
    found = []
    for piece in walk.pieces:
        codes = _taken(runs, piece.moves)
        own = [_of_group(param, piece.group) for param in params]
        found += [(piece, values) for values in _scaled(format.element, scale, codes, own)]
    return found


def _scaled(element: Element, scale: Scale | None, codes: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Terms of the values of one piece; `params` broadcast against its codes."""
    if scale is None:
        return terms(element, codes)
    whole = Granularity(1, None)
    if isinstance(element, Integer):
        return [affine.decode(element, scale, whole, codes, params)]
    decoded = Decoded(element)
    return [affine.decode(decoded, scale, whole, term, params) for term in terms(element, codes)]


def _taken(runs: Tensor, moves: Sequence[mover.Move]) -> Tensor:
    """The codes of one piece of every run: a shift and a mask for each plane that holds bits of them."""
    codes: Tensor | None = None
    for m in moves:
        field = runs[..., m.byte : m.byte + m.count]
        field = field >> m.bit if m.bit else field
        field = field if m.bit + m.width == 8 else field & ((1 << m.width) - 1)
        field = field << m.low if m.low else field
        codes = field if codes is None else codes | field
    assert codes is not None
    return codes


def _grouped(param: Tensor, format: Format, rows: int, walk: Plan) -> Tensor:
    """Scales (or zeros, or a tensor scale) as [N or 1, runs or 1, groups of a run or 1]."""
    assert format.scale is not None
    granularity = format.scale.granularity
    if param.numel() == 1 or granularity.cols is None:
        return param.reshape(param.shape[0], 1, 1)
    if granularity.is_block:
        assert granularity.rows is not None
        param = param.unsqueeze(1).expand(-1, granularity.rows, -1).reshape(rows, -1)
    missing = -param.shape[1] % walk.groups
    if missing:
        param = torch.nn.functional.pad(param, (0, missing))
    return param.reshape(rows, -1, walk.groups)


def _of_group(param: Tensor, group: int) -> Tensor:
    return param if param.shape[2] == 1 else param[:, :, group : group + 1]


def _runs_of(x: Tensor, walk: Plan) -> Tensor:
    """x as float32 [M, runs, codes of a run], the last run padded with zeros.

    In memory, or Inductor would compute what x is made of (a norm, a SiLU) again for each of the N rows.
    """
    x = x.to(torch.float32)
    missing = -x.shape[1] % walk.codes
    x = _in_memory(torch.nn.functional.pad(x, (0, missing)) if missing else x)
    return x.reshape(x.shape[0], -1, walk.codes)


def _part(row: Tensor, piece: Piece) -> Tensor:
    return row[:, piece.code : piece.code + piece.count]


def _settled(given: Tensor) -> Tensor:
    """A half-precision tensor as float32 in memory of its own; another as it is.

    A bfloat16 or float16 load makes Inductor's C++ take 32 lanes for a vector and emulate float32 by pairs,
    which is ten times slower for the whole loop; a conversion ahead of the loop costs next to nothing.
    """
    if given.dtype not in (torch.bfloat16, torch.float16):
        return given
    return _in_memory(given.to(torch.float32))


def _in_memory(computed: Tensor) -> Tensor:
    """The same numbers, but Inductor writes them down instead of computing them again in the loop that
    reads them: `as_strided` speaks of memory, so there has to be some.
    """
    return computed.as_strided(computed.shape, computed.stride())
