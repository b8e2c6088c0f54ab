"""Learned scales: float32 numbers that an optimizer moves, and the stored scales and zero points behind them.

In: a format and `step` (the value of one unit of its element) with, for zero points, `low` (the value of the
smallest code). Out: (scales, [zeros], [tensor_scale]) as the format stores them, and back.

    int4[g128]:        step 0.0312  ->  scales bfloat16 0.03125
    uint4[g32,zero]:   step 0.1, low -0.33  ->  scales 0.1, zeros 3
    mxfp4:             step 0.37  ->  the byte of 2**-1, the nearest power of two

`stored(fmt, *learned(fmt, params))` gives params back wherever the scales are floats, so that training begins
at the very codes that rounding would give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .element import Element
from .format import Format
from .granularity import Granularity
from .integer import Integer
from .rules import middle
from .scale import LARGEST, SMALLEST, Scale


def learned(fmt: Format, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(step, [low]) in float32 of stored parameters, in the scales' shape."""
    scale, element = _parts(fmt)
    step = scale.decode(params[0])
    if scale.two_level:
        step = step * params[1]
    if scale.zero == "none":
        return (step,)
    assert isinstance(element, Integer)
    zeros = params[1].to(torch.float32)
    if scale.zero == "int":
        return step, (element.first - zeros) * step
    return step, zeros - step * middle(element) if scale.zero == "float" else zeros


def stored(fmt: Format, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(scales, [zeros], [tensor_scale]) from (step, [low]). Steps that are stored without a sign are kept
    above 0."""
    scale, element = _parts(fmt)
    step = held[0].to(torch.float32)
    if scale.dtype == "e8m0":
        return (_nearest_power(step),)
    if scale.dtype == "e4m3" and not scale.two_level:
        return (scale.store(step.clamp(min=SMALLEST["e4m3"])),)
    if scale.two_level:
        step = step.clamp(min=0.0)
        level = (step.amax() / LARGEST["e4m3"]).reshape((1,) * max(step.ndim, 1))
        return scale.store(step / torch.where(level == 0, 1.0, level)), level
    scales = scale.store(step)
    if scale.zero == "none":
        return (scales,)
    assert isinstance(element, Integer)
    low, used = held[1].to(torch.float32), scales.to(torch.float32)
    if scale.zero == "int":
        zeros = (element.first - torch.round(low / used)).clamp(element.first, element.last)
        return scales, zeros.to(torch.int32).to(torch.int8 if element.signed else torch.uint8)
    zeros = low + used * middle(element) if scale.zero == "float" else low
    return scales, zeros.to(scale.stored)


def units(fmt: Format, x: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(x in units of the element, one step, the value of the smallest code or 0), the first in the shape that
    `split` gives, the others broadcasting against it; float32."""
    scale = fmt.scale
    if scale is None:
        x = x.to(torch.float32)
        return x, torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])
    grain = scale.granularity
    blocks = grain.split(x.to(torch.float32))
    step, *low = (grain.spread(part) for part in learned(fmt, params))
    safe = torch.where(step == 0, 1.0, step)
    if not low:
        return blocks / safe, safe, torch.zeros_like(safe)
    assert isinstance(fmt.element, Integer)
    return (blocks - low[0]) / safe + fmt.element.first, safe, low[0]


def grain_of(fmt: Format) -> Granularity:
    """Which numbers share a scale; the whole tensor for a format without scales."""
    return fmt.scale.granularity if fmt.scale is not None else Granularity(None, None)


def _parts(fmt: Format) -> tuple[Scale, Element]:
    assert fmt.scale is not None
    return fmt.scale, fmt.element


def _nearest_power(step: Tensor) -> Tensor:
    """The E8M0 byte of the power of two that is nearest to step; of two equally near ones, the larger."""
    raw = step.clamp(min=2.0**-127).view(torch.int32)
    byte = ((raw + 0x00400000) >> 23).clamp(0, 254)
    # 2**-127 is a float32 subnormal, whose exponent field says 0 and half of whose mantissa is set.
    byte = torch.where(raw <= 0x00400000, 0, byte)
    return torch.where(step.isfinite(), byte, 255).to(torch.uint8)
