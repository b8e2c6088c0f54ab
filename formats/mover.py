"""From an index map to tensor slices: how codes are packed, and the proof that no two of them collide.

In: a layout's fields, its period, unpacked codes. Out: moves (a run of codes <-> a run of bytes, one shift),
and the bytes they make.

    packed, 4 bits, 2 codes a period:  Move(code 0, bits 0-3 <-> byte 0, bit 0), Move(code 1, .. bit 4)

The map is evaluated once per (layout, bits, run, period); neighbouring codes that lie in neighbouring bytes
become one move, so a planar group of 128 four-bit codes is two moves of 64.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import sympy
import torch
from torch import Tensor

from .errors import FormatError

k = sympy.Symbol("k", integer=True, nonnegative=True)
K = sympy.Symbol("K", integer=True, positive=True)


@dataclass(frozen=True)
class Field:
    """Bits low .. low + width - 1 of code k lie in byte `byte` from bit `bit` on (expressions in k and K)."""

    low: int
    width: int
    byte: sympy.Expr
    bit: sympy.Expr


class Mapped(Hashable, Protocol):
    """What a layout must say for its moves to be derived."""

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]: ...


@dataclass(frozen=True)
class Move:
    """`width` bits from `low` on of `count` codes from `code` on lie in bytes from `byte` on, at `bit`."""

    code: int
    byte: int
    count: int
    low: int
    bit: int
    width: int


@dataclass(frozen=True)
class Moves:
    """All moves of one period, cut twice: so that equal runs of codes, and equal runs of bytes, line up."""

    bits: int
    codes: int
    bytes: int
    by_code: tuple[tuple[Move, ...], ...]
    by_byte: tuple[tuple[Move, ...], ...]


@lru_cache(maxsize=512)
def moves(layout: Mapped, bits: int, run: int | None, codes: int, size: int) -> Moves:
    """The moves of one period of `codes` codes in `size` bytes; FormatError if two bits meet."""
    byte, bit, low = evaluate(layout, bits, run, codes)
    place = byte * 8 + bit  # [field-bit, code]
    if np.unique(place).size != place.size or place.min(initial=0) < 0 or place.max(initial=0) >= size * 8:
        raise FormatError(f"layout {layout} puts two bits in one place, or one outside its {size} bytes")
    found = _runs(byte, bit, low)
    return Moves(
        bits,
        codes,
        size,
        _cut(found, [m.code for m in found], codes),
        _cut(found, [m.byte for m in found], size),
    )


def evaluate(
    layout: Mapped, bits: int, run: int | None, codes: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(byte, bit) [bits, codes] of every bit of the first `codes` codes, and each bit's place in its code."""
    position = np.arange(codes, dtype=np.int64)
    bytes_, bits_, low = [], [], []
    for f in layout.fields(bits, run):
        at = sympy.lambdify([k, K], [f.byte, f.bit], "numpy")(position, codes)
        byte, bit = (np.broadcast_to(np.asarray(a), (codes,)).astype(np.int64) for a in at)
        for i in range(f.width):
            bytes_.append(byte)
            bits_.append(bit + i)
            low.append(f.low + i)
    if sorted(low) != list(range(bits)):
        raise FormatError(f"layout {layout} places bits {sorted(low)} of a code of {bits} bits")
    return np.stack(bytes_), np.stack(bits_), low


def _runs(byte: np.ndarray, bit: np.ndarray, low: list[int]) -> list[Move]:
    """Bits merged along codes (bytes advance by one, same bit), then across bits (same run, next bit)."""
    single: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for row, place in enumerate(low):
        codes = byte.shape[1]
        starts = [0, *(np.flatnonzero((np.diff(byte[row]) != 1) | (np.diff(bit[row]) != 0)) + 1), codes]
        for a, b in itertools.pairwise(starts):
            if b > a:
                key = (int(a), int(byte[row, a]), int(b - a))
                single.setdefault(key, []).append((place, int(bit[row, a])))
    merged = []
    for (code, at, count), places in single.items():
        places.sort()
        width = 0
        for i, (place, where) in enumerate(places):
            width += 1
            last = i + 1 == len(places) or places[i + 1] != (place + 1, where + 1)
            if last:
                merged.append(Move(code, at, count, place - width + 1, where - width + 1, width))
                width = 0
    return merged


def _cut(found: list[Move], starts: list[int], total: int) -> tuple[tuple[Move, ...], ...]:
    """Moves cut at every boundary of codes (or bytes), gathered by the interval they fill."""
    ends = [s + m.count for s, m in zip(starts, found, strict=True)]
    edges = sorted({0, total, *starts, *ends})
    pieces: dict[int, list[Move]] = {a: [] for a in edges[:-1]}
    sizes = {a: b - a for a, b in itertools.pairwise(edges)}
    for start, end, m in zip(starts, ends, found, strict=True):
        for a in (e for e in edges if start <= e < end):
            ahead = a - start
            pieces[a].append(Move(m.code + ahead, m.byte + ahead, sizes[a], m.low, m.bit, m.width))
    return tuple(tuple(pieces[a]) or (Move(0, a, sizes[a], 0, 0, 0),) for a in edges[:-1])


def pack(codes: Tensor, moved: Moves, row_bytes: int) -> Tensor:
    """uint8 codes [..., K] -> uint8 bytes [..., row_bytes]."""
    length = codes.shape[-1]
    periods = -(-length // moved.codes)
    if length % moved.codes != 0:
        # Not pad(): on a fake tensor that refuses a size that varies.
        missing = periods * moved.codes - length
        codes = torch.cat([codes, codes.new_zeros((*codes.shape[:-1], missing))], -1)
    codes = codes.reshape(*codes.shape[:-1], periods, moved.codes)
    out = []
    for pieces in moved.by_byte:
        total: Tensor | None = None
        for m in pieces:
            if m.width == 0:  # a hole: padding that no code fills
                part = codes.new_zeros((*codes.shape[:-1], m.count))
            else:
                part = _shift(
                    _field(codes[..., m.code : m.code + m.count], m.low, m.width, moved.bits), m.bit
                )
            total = part if total is None else total | part
        assert total is not None
        out.append(total)
    packed = out[0] if len(out) == 1 else torch.cat(out, -1)
    packed = packed.reshape(*packed.shape[:-2], periods * moved.bytes)
    return packed if periods * moved.bytes == row_bytes else packed[..., :row_bytes]


def unpack(packed: Tensor, moved: Moves, length: int) -> Tensor:
    """uint8 bytes [..., row_bytes] -> uint8 codes [..., length]."""
    periods = -(-length // moved.codes)
    missing = periods * moved.bytes - packed.shape[-1]
    if missing != 0:
        packed = torch.cat([packed, packed.new_zeros((*packed.shape[:-1], missing))], -1)
    packed = packed.reshape(*packed.shape[:-1], periods, moved.bytes)
    out = []
    for pieces in moved.by_code:
        total: Tensor | None = None
        for m in pieces:
            part = _shift(_field(packed[..., m.byte : m.byte + m.count], m.bit, m.width, 8), m.low)
            total = part if total is None else total | part
        assert total is not None
        out.append(total)
    codes = out[0] if len(out) == 1 else torch.cat(out, -1)
    codes = codes.reshape(*codes.shape[:-2], periods * moved.codes)
    return codes if periods * moved.codes == length else codes[..., :length]


def _field(x: Tensor, low: int, width: int, bits: int) -> Tensor:
    """`width` bits of a `bits` wide number from `low` on."""
    x = x >> low if low else x
    return x if low + width == bits else x & ((1 << width) - 1)


def _shift(x: Tensor, by: int) -> Tensor:
    return x << by if by else x
