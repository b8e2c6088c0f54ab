"""How scales and zero points are chosen from data: every rule by name, in one table.

In: the extremes (or the mean magnitude) of each block. Out: (scales, [zeros], [tensor_scale]) as stored.
Scales are rounded to their stored dtype first; zero points and codes are then computed from the rounded
scale.

    int4, amax 15:  absmax 15 / 7.5 = 2;  noclip 15 / 7;  narrow 15 / 7
    mxfp4, amax 7:  floor 2**(2 - 2);  ceil and rceil 2**1

Sources: torchao's affine primitives (absmax, noclip, zero points), OCP MX 1.0 section 6.3 (floor), the
cublas rounding (rceil), BitNet b1.58 (absmean), GGUF (signed, narrow).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import hqq
from .element import Element
from .errors import FormatError, nearest
from .granularity import Granularity
from .integer import Integer
from .scale import LARGEST, Scale


@dataclass(frozen=True)
class Rule:
    """`about`: one line for the table of formats; `power`: makes E8M0 exponents, and only those;
    `integers`: only for signed integers without a zero point; `data`: a range of extremes is not enough;
    `zero`: the one zero point it makes."""

    about: str
    power: bool = False
    integers: bool = False
    data: bool = False
    zero: str = ""


RULES: dict[str, Rule] = {
    "absmax": Rule("amax / half the range (127.5, 7.5) for integers, amax / largest otherwise"),
    "noclip": Rule("the smallest scale that clips nothing: max(min / lowest, max / highest)", integers=True),
    "narrow": Rule("amax / highest (127, 7): the lowest code stays unused", integers=True),
    "signed": Rule("extreme / lowest, so the extreme is exact and the scale may be negative", integers=True),
    "absmean": Rule("mean magnitude", data=True),
    "hqq": Rule("half-quadratic: the zero point with the least p-norm of errors", data=True, zero="float"),
    "pow2": Rule("the smallest power of two that clips nothing"),
    "floor": Rule("2**(floor(log2 amax) - emax)", power=True),
    "ceil": Rule("2**(ceil(log2 amax) - emax)", power=True),
    "even": Rule("floor, with amax first rounded half up to the element's mantissa", power=True),
    "rceil": Rule("2**ceil(log2(amax / largest)), so nothing clips", power=True),
}


def default_rule(element: Element, dtype: str) -> str:
    """The rule a format has when its text names none."""
    return "floor" if dtype == "e8m0" else element.rule


def check_rule(element: Element, scale: Scale) -> None:
    """Raises FormatError if this element, scale dtype, zero point and rule do not go together."""
    rule = RULES.get(scale.rule)
    if rule is None:
        raise FormatError(
            f"unknown scale rule {scale.rule!r}{nearest(scale.rule, RULES)}; known: {', '.join(RULES)}"
        )
    powers = ", ".join(name for name, r in RULES.items() if r.power)
    if rule.power != (scale.dtype == "e8m0"):
        raise FormatError(
            f"rule {scale.rule!r} needs e8m0 scales, not {scale.dtype}"
            if rule.power
            else f"e8m0 scales take one of the rules {powers}, not {scale.rule!r}"
        )
    if rule.integers and not (isinstance(element, Integer) and element.signed and scale.zero == "none"):
        raise FormatError(
            f"rule {scale.rule!r} is for signed integers without a zero point, not for {element.name}"
        )
    if rule.integers and element.bits == 1:
        raise FormatError(f"rule {scale.rule!r} needs 2 bits or more; use int1, the sign bit")
    if scale.zero != "none" and not isinstance(element, Integer):
        raise FormatError(
            f"zero points are for integers; {element.name} is symmetric, leave the zero point out"
        )
    if scale.zero in ("float", "min") and isinstance(element, Integer) and element.signed:
        raise FormatError(
            f"zero:{scale.zero} is for unsigned integers; use u{element.name} instead of {element.name}"
        )
    if rule.zero and scale.zero != rule.zero:
        raise FormatError(
            f"rule {scale.rule!r} makes a zero point of its own; write zero:{rule.zero} with it"
        )
    if scale.zero != "none" and scale.rule not in ("absmax", "hqq"):
        raise FormatError(
            f"a scale with a zero point spans the range by itself; leave the rule {scale.rule!r} out"
        )
    if scale.zero != "none" and isinstance(element, Integer) and element.fraction:
        raise FormatError(f"zero points are for whole integers, not for {element.name}")
    if scale.rule == "even" and element.mantissa is None:
        raise FormatError(
            f"rule 'even' rounds at the element's mantissa, which codebook {element.name} lacks"
        )
    if scale.two_level and (scale.rule != "absmax" or (isinstance(element, Integer) and not element.signed)):
        raise FormatError(
            "two levels of scales come from the largest magnitude; leave the rule and unsigned out"
        )
    if scale.native and scale.dtype in ("e8m0", "e4m3"):
        raise FormatError(f"native arithmetic is for f32, bf16 and f16 scales, not {scale.dtype}")


def choose(element: Element, scale: Scale, granularity: Granularity, x: Tensor) -> tuple[Tensor, ...]:
    """(scales, [zeros], [tensor_scale]) for the data x [..., K] under `granularity`."""
    x = x if scale.native else x.to(torch.float32)
    if scale.rule == "absmean":
        return (_stored(scale, granularity.means(x.abs())),)
    if scale.rule == "hqq":
        assert isinstance(element, Integer)
        step, smallest = hqq.fit(element, granularity, x)
        return _with_zero(element, scale, step, smallest)
    if _symmetric(element, scale):
        amax = granularity.amax(x)
        return _from_amax(element, scale, amax)
    return from_range(element, scale, *granularity.extremes(x))


def from_range(element: Element, scale: Scale, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """The same from the smallest and largest number of each block, in the scales' shape."""
    if RULES[scale.rule].data:
        raise FormatError(
            f"rule {scale.rule!r} needs the data itself; a range of smallest and largest is not enough"
        )
    if not scale.native:
        low, high = low.to(torch.float32), high.to(torch.float32)
    if _symmetric(element, scale):
        return _from_amax(element, scale, torch.maximum(-low, high))
    if scale.zero == "int":
        return _integer_zero(element, scale, low.clamp(max=0), high.clamp(min=0))
    if scale.zero in ("float", "min"):
        return _float_zero(element, scale, low, high)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scale.rule == "noclip":
        return (_stored(scale, torch.maximum(_over(low, element.low), _over(high, element.high))),)
    if scale.rule == "signed":
        extreme = torch.where(-low >= high, low, high)
        return (_stored(scale, _over(extreme, element.low)),)
    return _from_amax(element, scale, high)  # unsigned: [0, max]


def _symmetric(element: Element, scale: Scale) -> bool:
    """Whether the largest magnitude alone decides."""
    unsigned = isinstance(element, Integer) and not element.signed
    return scale.zero == "none" and not unsigned and scale.rule not in ("noclip", "signed")


def _from_amax(element: Element, scale: Scale, amax: Tensor) -> tuple[Tensor, ...]:
    if scale.dtype == "e8m0":
        return (_power_of_two(element, scale.rule, amax),)
    if scale.two_level:
        return _two_levels(element, scale, amax)
    if scale.rule == "narrow":
        return (_stored(scale, _over(amax, element.reach)),)
    if scale.rule == "pow2":
        return (_stored(scale, _next_power(_over(amax, element.reach))),)
    return (_stored(scale, _over(amax, element.steps)),)


def _over(x: Tensor, by: float) -> Tensor:
    """x / by, rounded to nearest on every device: with a number for a divisor, a GPU's operator multiplies by
    its reciprocal, and every other quotient comes out in the last bit off."""
    if math.frexp(abs(by))[0] == 0.5:
        return x / by
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / wide.new_full((), by)).to(x.dtype)


def _stored(scale: Scale, value: Tensor) -> Tensor:
    if scale.native:
        value = value.clamp(min=torch.finfo(value.dtype).smallest_normal)
    return scale.store(value)


def _integer_zero(element: Element, scale: Scale, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    assert isinstance(element, Integer)
    scales = _stored(scale, _over(high - low, element.last - element.first))
    used = scales.to(low.dtype)
    zeros = (element.first - torch.round(low / used)).clamp(element.first, element.last)
    return scales, zeros.to(torch.int32).to(torch.int8 if element.signed else torch.uint8)  # a NaN is 0


def _float_zero(element: Element, scale: Scale, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    assert isinstance(element, Integer)
    return _with_zero(element, scale, _over(high - low, element.last - element.first), low)


def _with_zero(element: Integer, scale: Scale, step: Tensor, smallest: Tensor) -> tuple[Tensor, ...]:
    """(scales, zeros) as stored, from the step and the value of code 0."""
    scales = _stored(scale, step)
    zeros = smallest
    if scale.zero == "float":
        zeros = smallest + scales.to(smallest.dtype) * middle(element)
    return scales, zeros.to(scale.stored)


def middle(element: Integer) -> float:
    """The code that tinygemm's float zero point stands for: 8 for uint4."""
    return (element.last + element.first + 1) / 2


def _two_levels(element: Element, scale: Scale, amax: Tensor) -> tuple[Tensor, ...]:
    """NVFP4: one float32 a tensor brings the largest block scale to 448, the top of e4m3."""
    ndim = max(amax.ndim, 1)
    top = amax.amax() if amax.numel() else amax.new_zeros(())
    tensor_scale = _over(top, LARGEST["e4m3"] * element.reach).reshape((1,) * ndim)
    return block_scales(element, scale, amax, tensor_scale), tensor_scale


def block_scales(element: Element, scale: Scale, amax: Tensor, tensor_scale: Tensor) -> Tensor:
    """e4m3 block scales under a given tensor scale; a tensor scale of 0 (all zeros) gives the smallest."""
    quotient = _over(amax, element.reach) / torch.where(tensor_scale == 0, 1.0, tensor_scale)
    return scale.store(quotient)


def _power_of_two(element: Element, rule: str, amax: Tensor) -> Tensor:
    """The E8M0 byte of each block, by integer arithmetic on the float32 exponent: exact everywhere."""
    if rule == "rceil":
        exponent = _ceil_log2(_over(amax, element.reach))
    else:
        raw = amax.view(torch.int32)
        if rule == "even":
            raw = (raw + (1 << (23 - (element.mantissa or 0) - 1))) & 0x7F800000
        exponent = (raw >> 23) - 127 - element.emax
        if rule == "ceil":
            exponent = exponent + ((raw & 0x007FFFFF) > 0).to(torch.int32)
    byte = exponent.clamp(-127, 127) + 127
    return torch.where(amax.isfinite(), byte, 255).to(torch.uint8)


def _ceil_log2(x: Tensor) -> Tensor:
    """ceil(log2 x) as int32 for x >= 0; -127 for zero and everything up to 2**-127."""
    raw = x.view(torch.int32)
    up = ((raw & 0x007FFFFF) > 0).to(torch.int32)
    small = torch.where(raw > 0x00400000, -126, -127)
    return torch.where(raw < 0x00800000, small, (raw >> 23) - 127 + up)


def _next_power(x: Tensor) -> Tensor:
    """The smallest power of two that is not below x, as float32; NaN and infinity stay."""
    raw = x.to(torch.float32).view(torch.int32)
    up = (raw + 0x007FFFFF) & 0x7F800000
    return torch.where(x.isfinite(), up.view(torch.float32), x)
