"""The arithmetic between numbers and codes, given the scales: x -> codes and codes -> values.

In: x (or unpacked codes) [..., K] and (scales, [zeros], [tensor_scale]) as stored. Out: codes, or values.

    int4, scale 2, x = [3.0, -16.0]  ->  codes of [2, -8]  ->  values [4.0, -16.0]     (1.5 rounds to even: 2)

Integers multiply by the reciprocal of the scale, as the public affine primitives do (dividing moves 0.3 to
0.6 % of the codes); floats and codebooks divide; a power of two is the same either way. Everything is float32
unless the scale is `native`; the result is rounded to its dtype once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .element import Element
from .granularity import Granularity
from .integer import Integer
from .rules import middle
from .scale import Scale, e8m0_reciprocal


def encode(
    element: Element, scale: Scale, granularity: Granularity, x: Tensor, params: Sequence[Tensor]
) -> Tensor:
    """uint8 codes, one a byte, in x's shape."""
    return element.encode(_in_units(element, scale, granularity, x, params)).reshape(x.shape)


def decode(
    element: Element,
    scale: Scale,
    granularity: Granularity,
    codes: Tensor,
    params: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of unpacked codes, in their shape."""
    blocks = granularity.split(element.decode(codes, dtype if scale.native else torch.float32))
    return _scaled(element, scale, granularity, blocks, params).reshape(codes.shape).to(dtype)


def rounded(
    element: Element, scale: Scale, granularity: Granularity, x: Tensor, params: Sequence[Tensor]
) -> Tensor:
    """decode(encode(x)) in x's dtype, bit for bit, without codes where the element can."""
    units = _in_units(element, scale, granularity, x, params)
    blocks = element.rounded(units, x.dtype if scale.native else torch.float32)
    return _scaled(element, scale, granularity, blocks, params).reshape(x.shape).to(x.dtype)


def _in_units(
    element: Element, scale: Scale, granularity: Granularity, x: Tensor, params: Sequence[Tensor]
) -> Tensor:
    """What is encoded: x over the scale, in the shape that `split` gives."""
    blocks = granularity.split(x if scale.native else x.to(torch.float32))
    scales = granularity.spread(params[0])
    if scale.zero == "none":
        tensor_scale = params[1] if scale.two_level else None
        return _divided(element, scale, blocks, scales, tensor_scale)
    assert isinstance(element, Integer)
    steps = scales.to(blocks.dtype)
    zeros = granularity.spread(params[1]).to(blocks.dtype)
    if scale.zero == "int":
        return torch.round(blocks * _reciprocal(steps)) + zeros
    lowest = zeros - steps * middle(element) if scale.zero == "float" else zeros
    return (blocks - lowest) / torch.where(steps == 0, 1.0, steps).to(blocks.dtype)


def _scaled(
    element: Element, scale: Scale, granularity: Granularity, blocks: Tensor, params: Sequence[Tensor]
) -> Tensor:
    """The values of an element's values, in the working dtype and the shape that `split` gives."""
    working = blocks.dtype
    scales = granularity.spread(scale.decode(params[0])).to(working)
    if scale.zero == "none":
        if scale.two_level:
            scales = scales * _level(granularity, params[1])
        return blocks * scales
    assert isinstance(element, Integer)
    zeros = granularity.spread(params[1]).to(working)
    if scale.zero == "int":
        return (blocks - zeros) * scales
    if scale.zero == "float":
        blocks = blocks - middle(element)
    return blocks * scales + zeros


def _divided(
    element: Element, scale: Scale, blocks: Tensor, scales: Tensor, tensor_scale: Tensor | None
) -> Tensor:
    """x / scale, in the order of operations that the format's public definition has."""
    if scale.dtype == "e8m0":
        return blocks * e8m0_reciprocal(scales)
    steps = scales.to(blocks.dtype)
    if scale.dtype == "e4m3":
        multiplier = 1.0 / steps
        if tensor_scale is not None:
            level = tensor_scale.reshape((1,) * blocks.ndim)
            multiplier = (1.0 / torch.where(level == 0, 1.0, level)) / steps
        return blocks * multiplier
    if isinstance(element, Integer):
        return blocks * _reciprocal(steps)
    return blocks / torch.where(steps == 0, torch.ones_like(steps), steps)


def _reciprocal(steps: Tensor) -> Tensor:
    """1 / scale; 0 for a scale of 0, which a file may hold for a block of zeros."""
    return torch.where(steps == 0, torch.zeros_like(steps), 1.0 / steps)


def _level(granularity: Granularity, tensor_scale: Tensor) -> Tensor:
    """The tensor scale, with the axes that `spread` adds to the block scales."""
    return granularity.spread(tensor_scale)
