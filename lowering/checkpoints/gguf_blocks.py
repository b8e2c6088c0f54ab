"""GGUF's blocks: rows of bytes with a scale before its codes, as codes and scales of a format, and back.

In: uint8 [N, bytes of a row] and the name of the type. Out: a `Quantized` of the same numbers; for the types
of one level, the same bytes again.

    Q4_0  d f16, 16 bytes    ->  int4[g32,f16]             value = d * (q - 8)
    Q4_K  d, dmin f16, 6-bit scales and minimums of 8 groups of 32
                             ->  uint4[g32,f32,zero:min]   value = (d * s) * q - dmin * m

A byte of 4-bit codes holds number j in its low half and number j + 16 (or j + 32) in its high one. The K
types have two levels of scales. Their product has 11 + 6 (or 11 + 8) bits and is exact in float32, so that
every value is the one that GGUF decodes, for a larger scale: 6 bits a number instead of 4.5 for Q4_K. What
the product is made of is not kept, and K types are not written. Layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats import BitfoldError, Quantized, format

Split = tuple[Tensor, Tensor, Tensor | None]
"""Unpacked codes [N, blocks, numbers], scales and minimums [N, blocks, groups of a block]."""


@dataclass(frozen=True)
class BlockType:
    """`size` bytes hold `numbers`, of which every group has a scale, in `format`."""

    numbers: int
    size: int
    format: str
    split: Callable[[Tensor], Split]
    join: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None


def read_blocks(kind: str, data: Tensor) -> Quantized:
    """uint8 [.., N, bytes] of type `kind` -> codes and scales. Raises BitfoldError for a type not listed."""
    block = _block(kind)
    if data.shape[-1] % block.size:
        raise BitfoldError(f"a row of {data.shape[-1]} bytes is no whole number of {kind} blocks")
    codes, scales, zeros = block.split(data.reshape(*data.shape[:-1], -1, block.size))
    fmt = format(block.format)
    packed = fmt.pack(codes.flatten(-2).contiguous())
    zeros = None if zeros is None else zeros.flatten(-2).contiguous()
    return Quantized(fmt, codes.shape[-1] * codes.shape[-2], packed, scales.flatten(-2).contiguous(), zeros)


def write_blocks(q: Quantized) -> tuple[str, Tensor]:
    """The type that says `q`, and its rows of bytes. Raises BitfoldError if none does."""
    kind = kind_of(q)
    join = _BLOCKS[kind].join
    assert join is not None and q.scales is not None
    codes = q.format.unpack(q.codes, q.k)
    blocks = codes.reshape(*codes.shape[:-1], -1, 32)
    zeros = None if q.zeros is None else q.zeros.unsqueeze(-1)
    return kind, join(blocks, q.scales.unsqueeze(-1), zeros).flatten(-2)


def kind_of(q: Quantized) -> str:
    """The type of one level whose numbers, scales and zero points are those of `q`'s format."""
    for kind, block in _BLOCKS.items():
        known = format(block.format)
        assert known.scale is not None
        if block.join is None or q.format.scale is None or q.format.element != known.element:
            continue
        same = ("granularity", "dtype", "zero", "two_level")
        if all(getattr(q.format.scale, name) == getattr(known.scale, name) for name in same):
            return kind
    listed = ", ".join(f"{kind} ({b.format})" for kind, b in _BLOCKS.items() if b.join is not None)
    raise BitfoldError(f"no GGUF type that is written here says {q.format}; these are: {listed}")


def _block(kind: str) -> BlockType:
    if kind not in _BLOCKS:
        raise BitfoldError(f"GGUF's type {kind} is not read; these are: {', '.join(_BLOCKS)}")
    return _BLOCKS[kind]


# ---- bytes ----


def _half(data: Tensor) -> Tensor:
    """Two bytes a number -> float16."""
    return data.contiguous().view(torch.float16)


def _two_halves(data: Tensor) -> tuple[Tensor, Tensor]:
    """Four bytes -> two float16, each [.., 1]."""
    both = _half(data)
    return both[..., :1], both[..., 1:]


def _planes(data: Tensor, width: int, run: int = 32) -> Tensor:
    """Each `run` bytes hold 8 / width planes of codes, the low bits those that come first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).reshape(-1, 1)
    rows = data.reshape(*data.shape[:-1], -1, 1, run)
    return ((rows >> shifts) & ((1 << width) - 1)).flatten(-3)


def _bits(data: Tensor) -> Tensor:
    """Bytes -> their bits, the low one first."""
    return ((data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)


def _nibbles(codes: Tensor) -> Tensor:
    """32 codes of 4 bits -> 16 bytes."""
    return (codes[..., :16] & 15) | (codes[..., 16:] << 4)


def _high_bits(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes -> 4 bytes."""
    weights = 1 << torch.arange(8, dtype=torch.int64)
    return (((codes >> 4) & 1).reshape(*codes.shape[:-1], 4, 8) * weights).sum(-1).to(torch.uint8)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Offset binary -> two's complement, or back."""
    return codes ^ (1 << (bits - 1))


def _raw(*parts: Tensor) -> Tensor:
    return torch.cat([p.contiguous().view(torch.uint8) for p in parts], -1)


# ---- one level ----


def _four(with_minimum: bool) -> Callable[[Tensor], Split]:
    def split(data: Tensor) -> Split:
        head = 4 if with_minimum else 2
        codes, ends = _planes(data[..., head:], 4, 16), _half(data[..., :head])
        if with_minimum:
            return codes, ends[..., :1], ends[..., 1:]
        return _signed(codes, 4), ends, None

    return split


def _join_four(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    if zeros is not None:
        return _raw(scales, zeros, _nibbles(codes))
    return _raw(scales, _nibbles(_signed(codes, 4)))


def _five(with_minimum: bool) -> Callable[[Tensor], Split]:
    def split(data: Tensor) -> Split:
        head = 4 if with_minimum else 2
        low = _planes(data[..., head + 4 :], 4, 16)
        codes, ends = low | (_bits(data[..., head : head + 4]) << 4), _half(data[..., :head])
        if with_minimum:
            return codes, ends[..., :1], ends[..., 1:]
        return _signed(codes, 5), ends, None

    return split


def _join_five(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    codes = codes if zeros is not None else _signed(codes, 5)
    ends = (scales,) if zeros is None else (scales, zeros)
    return _raw(*ends, _high_bits(codes), _nibbles(codes))


def _eight(data: Tensor) -> Split:
    return data[..., 2:], _half(data[..., :2]), None


def _join_eight(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    del zeros
    return _raw(scales, codes)


def _micro(data: Tensor) -> Split:
    # GGUF's table is twice e2m1 and its scale half of E8M0, so codes and scale byte are OCP's, but for 255.
    if bool((data[..., 0] == 255).any()):
        raise BitfoldError("an MXFP4 block has the scale byte 255, which is 2**127 in GGUF and NaN in OCP MX")
    return _planes(data[..., 1:], 4, 16), data[..., :1], None


def _join_micro(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    del zeros
    return _raw(scales, _nibbles(codes))


# ---- two levels ----


def _six_bit_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minimums of 6 bits (Q4_K, Q5_K): the last four have their top bits in the
    first eight bytes."""
    first, second, rest = data[..., :4], data[..., 4:8], data[..., 8:]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], -1)
    minimums = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], -1)
    return scales, minimums


def _products(d: Tensor, scales: Tensor) -> Tensor:
    """float16 [.., 1] by small integers [.., groups], exact in float32."""
    return d.float() * scales.float()


def _two_bit(data: Tensor) -> Split:
    ends = data[..., :16]
    d, dmin = _two_halves(data[..., 80:84])
    return _planes(data[..., 16:80], 2), _products(d, ends & 15), -_products(dmin, ends >> 4)


def _three_bit(data: Tensor) -> Split:
    low, high = _planes(data[..., 32:96], 2), _planes(data[..., :32], 1)
    # The third bit is stored turned round: set means nothing is taken off. 100 is then -4.
    codes = low | ((high ^ 1) << 2)
    ends, d = data[..., 96:108], _half(data[..., 108:110])
    scales = _planes(ends[..., :8], 4, 8) | (_planes(ends[..., 8:], 2, 4) << 4)
    return codes, _products(d, scales.to(torch.int16) - 32), None


def _four_bit(data: Tensor) -> Split:
    d, dmin = _two_halves(data[..., :4])
    scales, minimums = _six_bit_pairs(data[..., 4:16])
    return _planes(data[..., 16:], 4), _products(d, scales), -_products(dmin, minimums)


def _five_bit(data: Tensor) -> Split:
    d, dmin = _two_halves(data[..., :4])
    scales, minimums = _six_bit_pairs(data[..., 4:16])
    codes = _planes(data[..., 48:], 4) | (_planes(data[..., 16:48], 1) << 4)
    return codes, _products(d, scales), -_products(dmin, minimums)


def _six_bit(data: Tensor) -> Split:
    codes = _planes(data[..., :128], 4, 64) | (_planes(data[..., 128:192], 2) << 4)
    scales, d = data[..., 192:208].view(torch.int8), _half(data[..., 208:210])
    return _signed(codes, 6), _products(d, scales), None


_BLOCKS: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, "q4_0", _four(False), _join_four),
    "Q4_1": BlockType(32, 20, "q4_1", _four(True), _join_four),
    "Q5_0": BlockType(32, 22, "int5[g32,f16]", _five(False), _join_five),
    "Q5_1": BlockType(32, 24, "uint5[g32,f16,zero:min]", _five(True), _join_five),
    "Q8_0": BlockType(32, 34, "q8_0", _eight, _join_eight),
    "MXFP4": BlockType(32, 17, "mxfp4", _micro, _join_micro),
    "Q2_K": BlockType(256, 84, "uint2[g16,f32,zero:min]", _two_bit),
    "Q3_K": BlockType(256, 110, "int3[g16,f32]", _three_bit),
    "Q4_K": BlockType(256, 144, "uint4[g32,f32,zero:min]", _four_bit),
    "Q5_K": BlockType(256, 176, "uint5[g32,f32,zero:min]", _five_bit),
    "Q6_K": BlockType(256, 210, "int6[g16,f32]", _six_bit),
}

TYPES = tuple(_BLOCKS)
