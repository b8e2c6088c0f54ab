"""Names of elements, layouts and whole formats: built in, registered by a caller, or found by entry point.

In: a name. Out: the element, layout or format it stands for, or an error with the nearest names.

    register("trits", Codebook("trits", (0.0, 1.0, -1.0)))      then  format("trits[g32]")  parses everywhere

The one table here is mutable module state, as that of `estimators` is. A package may also name an entry
point in the group `bitfold.formats`; it is loaded when a text first asks for that name.
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points

from . import cache_tag
from .catalog import ELEMENTS, FLOATS, FORMATS
from .element import Element
from .errors import FormatError, nearest
from .floating import Float
from .format import Format
from .integer import Integer
from .layout import BUILT_IN, Layout
from .rules import RULES
from .scale import STORED

Registered = Element | Format | Layout

_registered: dict[str, Registered] = {}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTEGER = re.compile(r"(u?)int([1-8])(?:f(\d))?")
GROUP = "bitfold.formats"


def register(name: str, what: Registered) -> None:
    """Makes `name` mean this element, layout or format in every text from now on; a taken name is refused."""
    if not _NAME.fullmatch(name):
        raise FormatError(f"a format's name is letters, digits and underscores, not {name!r}")
    if not isinstance(what, Element | Format | Layout):
        raise FormatError(
            f"only an Element, a Layout or a Format can be registered, not {type(what).__name__}"
        )
    if name in reserved() or find(name, discover=False) is not None:
        raise FormatError(f"the name {name!r} is taken; register the format under another name")
    if not isinstance(what, Format) and what.name != name:
        raise FormatError(f"{what.name!r} must be registered under its own name, not {name!r}")
    _registered[name] = what
    cache_tag.add(f"{name} {what!r}")


def find(name: str, discover: bool = True) -> Element | Format | Layout | None:
    """What `name` stands for, or None. Format aliases of the catalog are resolved in `text.py`."""
    if name in _registered:
        return _registered[name]
    if name in ELEMENTS:
        return ELEMENTS[name]
    found = _INTEGER.fullmatch(name)
    if found is not None:
        unsigned, bits, fraction = found.groups()
        return Integer(int(bits), not unsigned, int(fraction or 0))
    element = Float.parse(name)
    if element is not None or not discover:
        return element
    for entry in entry_points(group=GROUP, name=name):
        register(name, entry.load())
        return _registered[name]
    return None


def registered() -> dict[str, Registered]:
    """What callers have added, by name."""
    return dict(_registered)


def known() -> list[str]:
    """Names to suggest when one is unknown."""
    integers = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)]
    return [*integers, *FLOATS, *ELEMENTS, *FORMATS, *_registered]


def reserved() -> set[str]:
    """Names that mean something else inside brackets or in the catalog."""
    words = {"tensor", "row", "zero", "unscaled", "native", "two_level", "one_level", "dense"}
    return words | set(FORMATS) | set(RULES) | set(STORED) | set(BUILT_IN)


def unknown(name: str) -> FormatError:
    """The error for a name that nothing has."""
    return FormatError(f"unknown format {name!r}{nearest(name, known()) or '; `bitfold formats` lists them'}")
