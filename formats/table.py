"""The table of formats that the documentation and `bitfold formats` show, made from the formats themselves.

In: nothing, or the texts to describe. Out: one row a format.

    describe(["mxfp4"])  ->  [Row(name="mxfp4", bits=4.25, range="-6 .. 6", rule=..., source=...)]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .catalog import ELEMENTS, FLOATS, FORMATS
from .format import Format
from .registry import registered
from .rules import RULES
from .text import format

_SOURCES = {
    **FLOATS,
    "nf4": "QLoRA, arXiv 2305.14314",
    "ternary": "BitNet b1.58, arXiv 2402.17764",
    "binary": "XNOR-Net, arXiv 1603.05279",
    "int1": "XNOR-Net, arXiv 1603.05279",
    "int1_twos": "two's complement",
}


@dataclass(frozen=True)
class Row:
    """`bits`: per number, scales and metadata included, for a large tensor."""

    name: str
    stands_for: str
    bits: float
    range: str
    rule: str
    source: str


def describe(texts: Iterable[str] | None = None) -> list[Row]:
    """Rows for these texts, or for every format that has a name."""
    return [_row(text) for text in (_everything() if texts is None else texts)]


def _everything() -> list[str]:
    integers = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(8, 0, -1)]
    grouped = ["int4[g128]", "uint4[g128,zero]"]
    own = [str(what) if isinstance(what, Format) else name for name, what in registered().items()]
    names = [*integers, *grouped, *FLOATS, *(e for e in ELEMENTS if e not in integers), *FORMATS, *own]
    return list(dict.fromkeys(names))


def _row(text: str) -> Row:
    f = format(text)
    name = text.split("[")[0]
    source = FORMATS[name].source if name in FORMATS else _SOURCES.get(name, "affine integer")
    stands_for = FORMATS[name].text if name in FORMATS else f"{f.element.name}[{_spelled(f)}]"
    if name in registered():
        source = "registered"
    return Row(
        text, stands_for, f.bits_per_element(), f"{f.element.low:g} .. {f.element.high:g}", _rule(f), source
    )


def _spelled(f: Format) -> str:
    return "unscaled" if f.scale is None else f"{f.scale.granularity},{f.scale.dtype}"


def _rule(f: Format) -> str:
    if f.scale is None:
        return "none"
    zero = {
        "int": "(max - min) / steps, integer zero",
        "float": "(max - min) / steps, float zero at the middle",
        "min": "(max - min) / steps, the minimum added",
    }
    own = f"amax / {f.element.steps:g}" if f.scale.rule == "absmax" else RULES[f.scale.rule].about
    rule = zero.get(f.scale.zero, own)
    return rule + (", one float32 a tensor above" if f.scale.two_level else "")
