"""Decoding in plain Triton: what the assembly of `decode.py` does, in words that the interpreter can run.

In: an element, how a slice is taken out, what the loads are called. Out: lines of Triton source.

    int4, bits 4-7 of u0   ->   c = (u0 >> 4) & 15;  v = ((c ^ 8) - 8).to(tl.float32)

The units are int32 here, so that shifting brings in no sign. Tables are read from memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...formats import Element, Float, Integer
from ..slices import Take


def code_line(takes: Sequence[Take], loads: Sequence[str], name: str) -> str:
    """Assigns the codes of one slice, int32, to `name`."""
    terms = []
    for take in takes:
        term = f"(({loads[take.load]} >> {take.bit}) & {(1 << take.width) - 1})"
        terms.append(f"({term} << {take.low})" if take.low else term)
    return f"{name} = {' | '.join(terms)}"


def value_lines(element: Element, code: str, name: str) -> list[str]:
    """Assigns the value, float32, of the codes in `code` to `name`."""
    if isinstance(element, Integer):
        return [f"{name} = {_integer(element, code)}"]
    if isinstance(element, Float):
        return _float(element, code, name)
    return [f"{name} = tl.load(table + {code})"]


def needs_table(element: Element) -> bool:
    """Whether `value_lines` reads a table of the values, float32 [2**bits]."""
    return not isinstance(element, Integer | Float)


def _integer(element: Integer, code: str) -> str:
    half = 1 << (element.bits - 1)
    whole = f"(({code} ^ {half}) - {half})" if element.signed else code
    unit = f" * {2.0**-element.fraction!r}" if element.fraction else ""
    return f"{whole}.to(tl.float32){unit}"


def _float(element: Float, code: str, name: str) -> list[str]:
    """Sign and magnitude as the bits of a float32 whose exponent is off by a constant.

    A float32 multiplication may flush subnormals, so a magnitude below the first normal is an integer times
    the last bit instead.
    """
    top, m = element.bits - 1, element.mantissa_bits
    magnitude = f"({code} & {(1 << top) - 1})"
    normal = f"(({magnitude} + {(127 - element.bias) << m}) << {23 - m}).to(tl.float32, bitcast=True)"
    small = f"{magnitude}.to(tl.float32) * {2.0 ** (1 - element.bias - m)!r}"
    lines = [
        f"{name} = tl.where({magnitude} < {1 << m}, {small}, {normal})",
        f"{name} = tl.where(({code} >> {top}) != 0, -{name}, {name})",
    ]
    for value in element.values():
        if not math.isfinite(value):
            break
    else:
        return lines
    for special, written in (
        (math.inf, "float('inf')"),
        (-math.inf, "float('-inf')"),
        (None, "float('nan')"),
    ):
        codes = [c for c, v in enumerate(element.values()) if v == special or (special is None and v != v)]
        if codes:
            test = " | ".join(f"({code} == {c})" for c in codes)
            lines.append(f"{name} = tl.where({test}, {written}, {name})")
    return lines
