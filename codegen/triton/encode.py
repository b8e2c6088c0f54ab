"""Encoding in plain Triton: scales from data and codes from numbers, bit for bit as `formats/` does it.

In: a format, names of float32 values. Out: lines of Triton source.

    int8[bf16]   ->   s = stored(tl.div_rn(amax, 127.5));  c = rint(x * tl.div_rn(1.0, s)) clamped, & 255

Quotients are rounded to nearest (`/` is not, on a GPU), and kernels with these lines are compiled without
fusing products into sums: `x * r + c` would round once where the reference rounds twice.
"""

from __future__ import annotations

import math
import struct

from ...formats import Codebook, Element, Float, Integer, Scale
from ...formats.codebook import _boundaries
from ...formats.scale import LARGEST, SMALLEST

# Adding it and taking it away rounds what is below 2**22 to an integer, ties to even.
MAGIC = 12582912.0
# Scale dtype -> Triton's type of the stored scale.
STORED = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16", "e8m0": "tl.uint8"}


def magnitude_lines(values: list[str], name: str) -> list[str]:
    """name: the largest magnitude of each row over several [rows, numbers], NaN if there is one: magnitudes
    are compared as integers, among which NaN is the largest."""
    lines = []
    for i, x in enumerate(values):
        lines.append(f"{name}b{i} = tl.max({x}.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)")
    folded = f"{name}b0"
    for i in range(1, len(values)):
        folded = f"tl.maximum({folded}, {name}b{i})"
    return [*lines, f"{name} = ({folded}).to(tl.float32, bitcast=True)"]


def scale_lines(element: Element, scale: Scale, amax: str, name: str) -> list[str]:
    """name: the stored scale; name_f: its float32 value, or name_e, the byte of an e8m0."""
    if scale.dtype == "e8m0":
        return _power_of_two(element, scale.rule, amax, name)
    by = element.reach if scale.rule == "narrow" else element.steps
    return [
        f"{name}_q = tl.div_rn({amax}, tl.full({amax}.shape, {by!r}, tl.float32))",
        *stored_lines(scale, name),
    ]


def stored_lines(scale: Scale, name: str) -> list[str]:
    """{name}_q >= 0, float32 -> name, as stored, and name_f, its value."""
    low, high, q = SMALLEST[scale.dtype], LARGEST[scale.dtype], f"{name}_q"
    lines = [
        f"{name}_f = tl.minimum(tl.maximum({q}, {low!r}), {high!r})",
        # An infinite magnitude must poison its block rather than turn it into a finite one.
        f"{name}_f = tl.where(({q} != {q}) | ({q} == float('inf')), float('nan'), {name}_f)",
    ]
    if scale.dtype == "bf16":
        # In integers, so that nothing depends on how a cast rounds.
        lines += [
            f"{name}_r = {name}_f.to(tl.int32, bitcast=True)",
            f"{name}_r = ({name}_r + 0x7FFF + (({name}_r >> 16) & 1)) & -65536",
            f"{name}_f = tl.where({name}_f != {name}_f, {name}_f, {name}_r.to(tl.float32, bitcast=True))",
        ]
    lines.append(f"{name} = {name}_f.to({STORED[scale.dtype]})")
    return lines + ([f"{name}_f = {name}.to(tl.float32)"] if scale.dtype == "f16" else [])


def _power_of_two(element: Element, rule: str, amax: str, name: str) -> list[str]:
    raw = f"{name}_r"
    lines = [f"{raw} = {amax}.to(tl.int32, bitcast=True)", f"{name}_n = {raw} >= 0x7F800000"]
    if rule == "even":
        lines.append(f"{raw} = ({raw} + {1 << (23 - (element.mantissa or 0) - 1)}) & 0x7F800000")
    up = f" + (({raw} & 0x007FFFFF) > 0).to(tl.int32)" if rule == "ceil" else ""
    return [
        *lines,
        f"{name}_e = ({raw} >> 23) - {127 + element.emax}{up}",
        f"{name}_e = tl.minimum(tl.maximum({name}_e, -127), 127) + 127",
        f"{name}_e = tl.where({name}_n, 255, {name}_e)",
        f"{name} = {name}_e.to(tl.uint8)",
    ]


def read_lines(scale: Scale, name: str) -> list[str]:
    """What `scale_lines` leaves beside `name`, from a stored scale."""
    if scale.dtype == "e8m0":
        return [f"{name}_e = {name}.to(tl.int32)"]
    return [f"{name}_f = {name}.to(tl.float32)"]


def zero_lines(element: Integer, scale: Scale, values: list[str], name: str) -> list[str]:
    """name, name_f: the scale over the range of the values; name_z: the zero point, float32."""
    low = [f"tl.min(tl.where({x} == {x}, {x}, 0.0), 1)" for x in values]
    high = [f"tl.max(tl.where({x} == {x}, {x}, 0.0), 1)" for x in values]
    wrong = [f"tl.max(({x} != {x}).to(tl.int32), 1)" for x in values]
    return [
        f"{name}_low = {_folded('tl.minimum', [*low, '0.0'])}",
        f"{name}_high = {_folded('tl.maximum', [*high, '0.0'])}",
        f"{name}_wrong = {_folded('tl.maximum', wrong)}",
        f"{name}_span = {name}_high - {name}_low",
        f"{name}_q = tl.div_rn({name}_span, "
        f"tl.full({name}_span.shape, {float(element.last - element.first)!r}, tl.float32))",
        f"{name}_q = tl.where({name}_wrong != 0, float('nan'), {name}_q)",
        *stored_lines(scale, name),
        f"{name}_z = tl.div_rn({name}_low, {name}_f)",
        f"{name}_z = tl.maximum(tl.minimum({name}_z, 1048576.0), -1048576.0)",
        f"{name}_z = {float(element.first)!r} - (({name}_z + {MAGIC!r}) - {MAGIC!r})",
        f"{name}_z = tl.minimum(tl.maximum({name}_z, {float(element.first)!r}), {float(element.last)!r})",
        f"{name}_z = tl.where({name}_f != {name}_f, 0.0, {name}_z)",
    ]


def _folded(function: str, values: list[str]) -> str:
    folded = values[0]
    for value in values[1:]:
        folded = f"{function}({folded}, {value})"
    return folded


def code_lines(element: Element, scale: Scale | None, x: str, s: str, code: str) -> list[str]:
    """code: int32 codes of x [rows, numbers] under the scale `s` of `scale_lines`, one a row."""
    lines = _unscaled(element, scale, x, s)
    if isinstance(element, Integer):
        mask = (1 << element.bits) - 1
        return [*lines, *_integer(element, scale, s), f"{code} = y.to(tl.int32) & {mask}"]
    if isinstance(element, Float):
        return [*lines, *_float(element, code)]
    assert isinstance(element, Codebook)
    return [*lines, *_table(element, code)]


def rounded_lines(
    element: Integer | Float, scale: Scale | None, x: str, s: str, name: str, *, poisoned: bool
) -> list[str]:
    """name: what the codes of x stand for (times the scale), float32, without making codes of them.
    poisoned: where x is NaN the scale is too, so that it need not be looked at."""
    lines = _unscaled(element, scale, x, s)
    if isinstance(element, Float):
        return [*lines, *_rounded_float(element, name, poisoned)]
    unit = f" * {2.0**-element.fraction!r}" if element.fraction else ""
    rounded = [line for line in _integer(element, scale, s) if not (poisoned and line in _NOT_A_NUMBER)]
    return [*lines, *rounded, f"{name} = y{unit}"]


def _unscaled(element: Element, scale: Scale | None, x: str, s: str) -> list[str]:
    """y: x in units of the scale."""
    if scale is None:
        return [f"y = {x}"]
    if scale.dtype == "e8m0":
        return [
            f"d = tl.where({s}_e == 254, 0x00400000, (254 - {s}_e) << 23)",
            f"d = tl.where({s}_e == 255, float('nan'), d.to(tl.float32, bitcast=True))",
            f"y = {x} * d[:, None]",
        ]
    if isinstance(element, Integer):
        one = f"tl.full({s}_f.shape, 1.0, tl.float32)"
        return [
            f"d = tl.where({s}_f == 0.0, 0.0, tl.div_rn({one}, {s}_f))",
            f"y = {x} * d[:, None]",
        ]
    return [
        f"d = tl.where({s}_f == 0.0, 1.0, {s}_f)",
        f"y = tl.div_rn({x}, tl.broadcast_to(d[:, None], {x}.shape))",
    ]


def _integer(element: Integer, scale: Scale | None, s: str) -> list[str]:
    """y rounded to the numbers that codes are. Clamped before it is rounded: the bounds are integers, so the
    order makes no difference, and between the product and the sum stands something that cannot be fused. NaN
    becomes 0."""
    zero = f"{s}_z[:, None]" if scale is not None and scale.zero == "int" else ""
    first, last = float(element.first), float(element.last)
    wide = 1048576.0 if zero else None
    lines = [f"y = y * {float(1 << element.fraction)!r}"] if element.fraction else []
    lines += [
        _NOT_A_NUMBER[0],
        f"y = tl.minimum(tl.maximum(y, {-wide if wide else first!r}), {wide or last!r})",
        f"y = (y + {MAGIC!r}) - {MAGIC!r}",
    ]
    if zero:
        lines.append(f"y = tl.minimum(tl.maximum(y + {zero}, {first!r}), {last!r})")
    return [*lines, _NOT_A_NUMBER[1]]


_NOT_A_NUMBER = ("no = y != y", "y = tl.where(no, 0.0, y)")


def _float(element: Float, code: str) -> list[str]:
    """`Float.encode` in the same integers."""
    m, top = element.mantissa_bits, element.bits - 1
    magic = (127 + 1 - element.bias + 23 - m) << 23
    shift = 23 - m
    lines = [
        *_halves(element),
        f"above = above >> {shift}",
        f"{code} = below.to(tl.int32, bitcast=True) - {magic} + above - {(127 + 1 - element.bias) << m}",
        f"{code} = {code} | ((raw >> {31 - top}) & {1 << top})",
    ]
    if element.ending == "fnuz":
        lines.append(f"{code} = tl.where({code} == {1 << top}, 0, {code})")
    if element.bits == 8:
        lines.append(f"{code} = tl.where(y != y, {element._nan_code}, {code})")
    return lines


def _halves(element: Float) -> list[str]:
    """below: what y has up to the smallest normal number, on a float32 whose last bit is the last of a
    subnormal; above: the bits of its magnitude from there on, with half a last bit added for the cut."""
    m = element.mantissa_bits
    smallest, shift = (127 + 1 - element.bias) << 23, 23 - m
    high = int.from_bytes(struct.pack("<f", element.high), "little")
    return [
        "raw = y.to(tl.int32, bitcast=True)",
        f"size = tl.minimum(raw & 0x7FFFFFFF, {high})",
        f"below = tl.minimum(size, {smallest}).to(tl.float32, bitcast=True) + {_last_bit(element)!r}",
        f"above = tl.maximum(size, {smallest})",
        f"above = above + ((above >> {shift}) & 1) + {(1 << (shift - 1)) - 1}",
    ]


def _last_bit(element: Float) -> float:
    return math.ldexp(1.0, 23 + 1 - element.bias - element.mantissa_bits)


def _rounded_float(element: Float, name: str, poisoned: bool) -> list[str]:
    smallest = math.ldexp(1.0, 1 - element.bias)
    cut = -(1 << (23 - element.mantissa_bits))
    lines = [
        *_halves(element),
        f"below = (below - {_last_bit(element)!r}) - {smallest!r}",  # 0 from the smallest normal number on
        f"{name} = (above & {cut}).to(tl.float32, bitcast=True) + below",
        f"bits = {name}.to(tl.int32, bitcast=True) | (raw & -2147483648)",
    ]
    if element.ending == "fnuz":  # it has no -0
        lines.append("bits = tl.where(bits == -2147483648, 0, bits)")
    lines.append(f"{name} = bits.to(tl.float32, bitcast=True)")
    if element.bits == 8 and not poisoned:
        lines.append(f"{name} = tl.where(y != y, float('nan'), {name})")
    return lines


def _table(element: Codebook, code: str) -> list[str]:
    order, bounds = _boundaries(element.table)
    lines = [f"{code} = tl.full(y.shape, {order[0]}, tl.int32)"]
    for bound, below, above in zip(bounds, order, order[1:], strict=False):
        lines.append(f"{code} += tl.where(y > {bound!r}, {above - below}, 0)")
    return lines
