"""Codes in 32-bit words, as compressed-tensors packs them: offset binary, a dense stream of bits.

In: int32 [N, words]. Out: a format's own codes; and back, bit for bit.

    int4 codes -8, 7, ..  ->  0, 15, ..  ->  word 0x...f0      (the low bits of a word hold the first code)

The stream is the canonical layout of a format but for two things: rows end at a word, not at a byte, and a
signed code has its sign bit turned round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ...formats.integer import Integer
from ...formats.layout import Packed

_STREAM = Packed()


def from_words(fmt: Format, words: Tensor, k: int) -> Tensor:
    """int32 [N, words] -> codes of `fmt`, [N, row_bytes] as its layout has them."""
    raw = words.contiguous().view(torch.uint8)
    used = raw[..., : _STREAM.row_bytes(fmt.element.bits, None, k)]
    return fmt.pack(_STREAM.unpack(used.contiguous(), k, fmt.element.bits) ^ _sign(fmt))


def to_words(fmt: Format, codes: Tensor, k: int) -> Tensor:
    """Codes as `fmt` has them -> int32 [N, words]."""
    return _words(fmt.unpack(codes, k) ^ _sign(fmt), fmt.element.bits)


def zeros_from_words(fmt: Format, words: Tensor, rows: int) -> Tensor:
    """int32 [words, groups], packed along the rows -> zero points [rows, groups] of `fmt`."""
    bits = fmt.element.bits
    raw = words.mT.contiguous().view(torch.uint8)[..., : _STREAM.row_bytes(bits, None, rows)]
    offset = _STREAM.unpack(raw.contiguous(), rows, bits).mT.contiguous()
    return (offset - (1 << (bits - 1))).view(torch.int8) if _sign(fmt) else offset


def zeros_to_words(fmt: Format, zeros: Tensor) -> Tensor:
    """Zero points [rows, groups] -> int32 [words, groups], packed along the rows."""
    bits = fmt.element.bits
    offset = zeros.view(torch.uint8) + (1 << (bits - 1) if _sign(fmt) else 0)
    return _words(offset.mT.contiguous(), bits).mT.contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    raw = _STREAM.pack(codes.contiguous(), bits)
    padded = torch.nn.functional.pad(raw, (0, -raw.shape[-1] % 4))
    return padded.contiguous().view(torch.int32)


def _sign(fmt: Format) -> int:
    """The bit that is turned round; 0 for an unsigned element, whose codes are offset already."""
    element = fmt.element
    assert isinstance(element, Integer)
    return 1 << (element.bits - 1) if element.signed else 0
