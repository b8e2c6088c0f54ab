"""Values of codes in the few, vectorizable operations that Inductor's C++ can keep in one loop.

In: unpacked codes, uint8, and their element. Out: terms, float32, whose sum is what `element.decode` gives.

    int4        [codes to float]                                     as the element says itself
    float4_e2m1 [((u - (t << m)) << t) * 2**(1 - bias - m), signed]  integers, no table, no float bits
    ternary     [where(bit 1, where(bit 0, .., -1), where(bit 0, 1, 0))]
    nf4         two such trees, one for codes below 8 and one for the rest, each 0 where the other holds

Inductor writes a value to memory (as many floats as there are codes, in every call) when it takes more than
30 to 50 operations, hence two terms instead of a tree of 16 leaves. An indexed table it would read code by
code, without vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Element, Float, Integer

LEAVES = 8


class Decoded(Element):
    """An element whose codes are its values already: what is left of decoding is the scale."""

    def __init__(self, element: Element) -> None:
        self.name, self.bits, self.low, self.high = element.name, element.bits, element.low, element.high

    def values(self) -> tuple[float, ...]:
        return ()

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype)


def terms(element: Element, codes: Tensor) -> list[Tensor]:
    """float32 tensors of the codes' shape that sum to the decoded values; each code counts in one of them."""
    if isinstance(element, Integer) or element.bits == 8:
        return [element.decode(codes)]
    if isinstance(element, Float):
        return [_small_float(element, codes.to(torch.int32))]
    if element.bits <= 4:
        return _from_trees(list(element.values()), codes.to(torch.int32))
    return [element.decode(codes)]


def _small_float(element: Float, codes: Tensor) -> Tensor:
    """A float without infinities: its magnitude in units of the last subnormal bit is a small integer.

    u = exponent and fraction bits, t = max(exponent - 1, 0): of the exponent, (t << m) leaves the hidden one.
    """
    m, top = element.mantissa_bits, element.bits - 1
    u = codes & ((1 << top) - 1)
    t = ((u >> m) - 1).clamp(min=0)
    magnitude = (u - (t << m)) << t
    negative = codes >> top
    signed = (magnitude ^ -negative) + negative
    return signed.to(torch.float32) * 2.0 ** (1 - element.bias - m)


def _from_trees(table: list[float], codes: Tensor) -> list[Tensor]:
    if len(table) <= LEAVES:
        return [_tree(table, codes)]
    low, high = _tree(table[:LEAVES], codes), _tree(table[LEAVES:], codes)
    above = codes >= LEAVES
    return [torch.where(above, 0.0, low), torch.where(above, high, 0.0)]


def _tree(table: list[float], codes: Tensor) -> Tensor:
    """`table[codes % len(table)]` by one selection a bit, lowest bit first."""
    level: list[float | Tensor] = list(table)
    bit = 1
    while len(level) > 1:
        is_set = (codes & bit) != 0
        level = [torch.where(is_set, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
        bit <<= 1
    assert isinstance(level[0], Tensor)
    return level[0]
