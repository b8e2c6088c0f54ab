"""The text form of a format: what a recipe, an operator's attribute, a file and a kernel's name carry.

In: text. Out: a Format; and a Format prints as the shortest text that parses to it.

    int4[g128]             element int4, groups of 128, bf16 scales (the default for groups), symmetric
    int8                   int8[row] with float32 scales
    uint4[g32,f16,zero:min]   prints as its alias: q4_1
    mxfp4[rceil,planar]    an alias with items changed

Items, in the order they print: granularity (tensor, row, g64, 128x128), scale dtype (f32, bf16, f16, e8m0,
e4m3), zero point (zero, zero:float, zero:min), rule, native, two_level or one_level, sparsity (2:4), layout.
`unscaled` alone says that there is no scale.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from . import group_lanes, panels, registry, spare, sparsity, units
from . import layout as layouts
from .catalog import FORMATS
from .element import Element
from .errors import FormatError, nearest
from .format import Format
from .granularity import Granularity
from .layout import Layout
from .rules import RULES, default_rule
from .scale import STORED, Scale
from .sparsity import Dense

_SHAPE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:\[(.*)\])?\s*")
_WORDS = {
    "native": ("native", True),
    "two_level": ("two_level", True),
    "one_level": ("two_level", False),
    "unscaled": ("scaled", False),
    "zero": ("zero", "int"),
    "zero:int": ("zero", "int"),
    "zero:float": ("zero", "float"),
    "zero:min": ("zero", "min"),
    "zero:none": ("zero", "none"),
}

_SPELLED: dict[str, dict[Any, str]] = {
    "scaled": {False: "unscaled"},
    "zero": {"int": "zero", "float": "zero:float", "min": "zero:min", "none": "zero:none"},
    "native": {True: "native"},
    "two_level": {True: "two_level", False: "one_level"},
}
_SCALE = ("granularity", "dtype", "zero", "rule", "two_level", "native")
_ORDER = ("scaled", "granularity", "dtype", "zero", "rule", "native", "two_level", "sparsity", "layout")

Items = dict[str, Any]


def format(text: str | Format) -> Format:
    """The format that `text` spells. Raises FormatError, with the nearest names, if it spells none."""
    if isinstance(text, Format):
        return text
    if not isinstance(text, str):
        raise FormatError(f"a format is given as text such as 'int4[g128]', not as {type(text).__name__}")
    return _parsed(text)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Format:
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise FormatError(f"{text!r} is not a format; write an element and items, such as 'int4[g128]'")
    name, inside = found.groups()
    given = _items(text, inside or "")
    if name in FORMATS:
        return _changed(_parsed(FORMATS[name].text), given)
    base = registry.find(name)
    if isinstance(base, Format):
        return _changed(base, given)
    if not isinstance(base, Element):
        raise registry.unknown(name)
    return _built(base, given)


def _items(text: str, inside: str) -> Items:
    """The items in brackets, by the field they set; no field twice."""
    found: Items = {}
    for word in (w.strip() for w in inside.split(",")):
        if not word and not inside.strip():
            continue
        key, value = _item(text, word)
        if key in found:
            raise FormatError(f"{text!r} says twice what its {key} is; leave one out")
        found[key] = value
    return found


def _item(text: str, word: str) -> tuple[str, Any]:
    if word in _WORDS:
        return _WORDS[word]
    if word in STORED:
        return "dtype", word
    if word in RULES:
        return "rule", word
    for key, parse in (("granularity", Granularity.parse), ("sparsity", sparsity.parse), ("layout", _layout)):
        value = parse(word)
        if value is not None:
            return key, value
    choices = [*_WORDS, *STORED, *RULES, *layouts.names(), "tensor", "row", "g128", "128x128", "2:4"]
    raise FormatError(
        f"{text!r} has an item {word!r} that is none of a format's items{nearest(word, choices)}"
    )


def _layout(word: str) -> Layout | None:
    for parse in (layouts.parse, spare.parse, group_lanes.parse, panels.parse, units.Units.parse):
        built_in = parse(word)
        if built_in is not None:
            return built_in
    found = registry.registered().get(word)
    return found if isinstance(found, Layout) else None


def layout_named(text: str) -> Layout:
    """The layout that `text` spells; FormatError if none."""
    found = _layout(text)
    if found is None:
        raise FormatError(
            f"unknown layout {text!r}{nearest(text, layouts.names())}; known: {', '.join(layouts.names())}"
        )
    return found


def _built(element: Element, items: Items) -> Format:
    """A format from items, the defaults filled in."""
    if not items.get("scaled", True):
        extra = set(items) - {"scaled", "layout", "sparsity"}
        if extra:
            raise FormatError(f"an unscaled format has no {' and no '.join(sorted(extra))}; leave it out")
    full = _defaults(element, items.get("granularity", Granularity()), items.get("dtype")) | items
    scale = Scale(**{key: full[key] for key in _SCALE}) if full["scaled"] else None
    return Format(element, scale, full["layout"], full["sparsity"])


def _defaults(element: Element, granularity: Granularity, dtype: str | None) -> Items:
    """Every item that a text leaves out."""
    usual = "f32" if granularity.cols is None else "bf16"
    return {
        "scaled": True,
        "granularity": Granularity(),
        "dtype": usual,
        "zero": "none",
        "rule": default_rule(element, dtype or usual),
        "native": False,
        "two_level": False,
        "sparsity": Dense(),
        "layout": layouts.default(element.bits),
    }


def _changed(base: Format, given: Items) -> Format:
    """`base` with the given items in place of its own; a new scale dtype brings its default rule."""
    if not given:
        return base
    items = _all_items(base)
    if "dtype" in given:
        items.pop("rule", None)
        if given["dtype"] != "e4m3":
            items.pop("two_level", None)
    if "scaled" in given:
        items = {key: items[key] for key in ("layout", "sparsity")}
    return _built(base.element, items | given)


def _all_items(f: Format) -> Items:
    items: Items = {"scaled": f.scale is not None}
    if f.scale is not None:
        items |= {key: getattr(f.scale, key) for key in _SCALE}
    return items | {"sparsity": f.sparsity, "layout": f.layout}


def to_text(f: Format) -> str:
    """The canonical text: an alias where one differs in nothing but rounding, sparsity and layout."""
    items = _all_items(f)
    for name, base in _aliases():
        if _same_family(base, f):
            return _printed(name, items, _all_items(base))
    granularity = f.scale.granularity if f.scale is not None else Granularity()
    return _printed(f.element.name, items, _defaults(f.element, granularity, items.get("dtype")))


def _printed(name: str, items: Items, base: Items) -> str:
    """`name[items that differ from base]`, in the canonical order."""
    words = []
    for key in _ORDER:
        if key not in items or items[key] == base.get(key):
            continue
        words.append(_SPELLED[key][items[key]] if key in _SPELLED else str(items[key]))
    return f"{name}[{','.join(words)}]" if words else name


def _aliases() -> list[tuple[str, Format]]:
    own = [(name, what) for name, what in registry.registered().items() if isinstance(what, Format)]
    return own + [(name, _parsed(alias.text)) for name, alias in FORMATS.items()]


def _same_family(base: Format, f: Format) -> bool:
    if base.element != f.element or base.scale is None or f.scale is None:
        return base.element == f.element and base.scale is f.scale
    scale = base.scale
    if f.scale.dtype == scale.dtype and scale.dtype in ("e8m0", "e4m3"):
        # block floats: another rounding of the scale does not make another format
        scale = replace(scale, rule=f.scale.rule, two_level=f.scale.two_level)
    return scale == f.scale
