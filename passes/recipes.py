"""Recipes: named, exact statements of which layers take which formats.

In: a name (`int4`), a bare format (`int4[g64]`), JSON text or the path of a JSON file. Out: a `Recipe`, an
ordered list of rules of which **the last one that matches a layer decides** (as in a .gitignore), so that
exceptions are written after what they are exceptions from.

    Recipe.parse("int4")  ->  linear *: weight int4[g128]
    Recipe.parse("int4").but(Rule("*.layers.0.*", skip="the first layer is sensitive"))

Op kinds. *linear* is every matmul with a constant weight, whichever way it was written, heads excepted. A
*head* is a linear whose weight is also an embedding's, or whose module path ends in one of `HEAD_NAMES` and
has no number in it (`lm_head`, `model.classifier`, not `layers.0.head`): the same answer whatever part of
the model a graph shows. *conv* is a convolution of one or two dimensions, *embedding* a table that is
indexed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..formats import BitfoldError, FormatError, format, nearest
from .rules import CACHE, STORED, Rule, Site

HEAD_NAMES = ("lm_head", "head", "embed_out", "output_projection", "classifier", "score", "output")

_EVERYTHING = "linear|head|conv|embedding"


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules under a name."""

    name: str
    rules: tuple[Rule, ...]
    about: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.name or not isinstance(self.name, str):
            raise BitfoldError(f"a recipe needs a name, not {self.name!r}")
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise BitfoldError(f"recipe {self.name!r}: {rule!r} is not a Rule")

    def rule(self, site: Site) -> Rule | None:
        """The last rule that matches, or None: the recipe does not speak of this layer."""
        return next((rule for rule in reversed(self.rules) if rule.matches(site)), None)

    def unmatched(self, sites: Iterable[Site]) -> list[Rule]:
        """Rules that name layers, none of which is among `sites` (all of a model's)."""
        known = list(sites)
        # Caches are not among the layers; the pass that quantizes them says which of its rules found none.
        named = [rule for rule in self.rules if rule.match != "*" and rule.op != CACHE]
        return [rule for rule in named if not any(rule.matches(site) for site in known)]

    def but(self, *rules: Rule, name: str = "") -> Recipe:
        """This recipe with further rules, which win where they match."""
        return Recipe(name or f"{self.name}+{len(rules)}", (*self.rules, *rules), self.about)

    @property
    def calibrated(self) -> bool:
        """True if a rule finds the range of activations by observing calibration data."""
        return any(rule.observer for rule in self.rules)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        data: dict[str, object] = {"name": self.name, "rules": [rule.to_dict() for rule in self.rules]}
        return data | ({"about": self.about} if self.about else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Recipe:
        """The recipe that `to_dict` wrote. `base` names a recipe whose rules come first."""
        return cls._from_dict(data, ())

    @classmethod
    def _from_dict(cls, data: Mapping[str, object], inside: tuple[str, ...]) -> Recipe:
        """`inside`: the files that are being read, so that one cannot build on itself."""
        known = ("name", "base", "rules", "about")
        for key in data:
            if key not in known:
                raise BitfoldError(
                    f"unknown key {key!r} in a recipe{nearest(str(key), known)}; keys are {', '.join(known)}"
                )
        rules = data.get("rules", ())
        if not isinstance(rules, list | tuple):
            raise BitfoldError(f"a recipe's rules are a list, not {rules!r}")
        base = cls._parse(str(data["base"]), inside).rules if "base" in data else ()
        return cls(
            str(data.get("name", "custom")),
            (*base, *(Rule.from_dict(rule) for rule in rules)),
            str(data.get("about", "")),
        )

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """A recipe from a name, a format's text, JSON text or a JSON file's path; a Recipe as it is.

        A name goes before a format of the same spelling: `int4` is the recipe with groups of 128,
        `int4[row]` the format with one scale a row. Raises BitfoldError with the nearest names for anything
        else.
        """
        if isinstance(text, Recipe):
            return text
        if not isinstance(text, str):
            raise BitfoldError(f"a recipe is a name, a format, JSON or a Recipe, not {type(text).__name__}")
        return cls._parse(text.strip(), ())

    @classmethod
    def _parse(cls, text: str, inside: tuple[str, ...]) -> Recipe:
        if text in _NAMED:
            return _named(text)
        if text.startswith("{"):
            return cls._from_dict(_json(text, "the recipe"), inside)
        if text in inside:
            raise BitfoldError(f"recipe file {text} builds on itself: {' on '.join((*inside, text))}")
        if text.endswith(".json"):
            return cls._from_dict(_json(_read(text), text), (*inside, text))
        try:
            known = str(format(text))
        except FormatError as error:
            raise BitfoldError(_unknown(text, error)) from error
        return cls(known, (Rule(weight=known),), f"linears {known}; head and embedding untouched")

    def __str__(self) -> str:
        """The shortest text that parses back to this recipe."""
        try:
            if Recipe.parse(self.name) == self:
                return self.name
        except BitfoldError:
            return json.dumps(self.to_dict())
        return json.dumps(self.to_dict())


def is_head(path: str) -> bool:
    """True if the path of a linear is that of a head (see the definition at the top)."""
    parts = path.split(".")
    return parts[-1] in HEAD_NAMES and not any(part.isdigit() for part in parts)


def names() -> list[str]:
    """The names of the recipes that ship with bitfold."""
    return list(_NAMED)


def _unknown(text: str, error: FormatError) -> str:
    if "[" in text:
        return f"{text!r} is neither a recipe nor a format: {error}"
    close = nearest(text, _NAMED)
    return f"unknown recipe or format {text!r}" + (
        close or f"; give one of {', '.join(_NAMED)}, or a format such as int4[g64]"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BitfoldError(f"recipe file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # bytes that are no UTF-8, a path with a zero byte
        raise BitfoldError(f"recipe file {path!r} is no text: {error}") from error


def _json(text: str, where: str) -> dict[str, object]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BitfoldError(f"{where} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise BitfoldError(f"{where} is nested too deep to be a recipe") from error
    if not isinstance(data, dict):
        raise BitfoldError(f"{where} must be a JSON object with 'rules', not {type(data).__name__}")
    return data


def _weights(linear: str, about: str) -> tuple[tuple[dict[str, str], ...], str]:
    return ({"weight": linear},), about


def _both(
    linear: str, activation: str, about: str, observer: str = ""
) -> tuple[tuple[dict[str, str], ...], str]:
    return ({"weight": linear, "input": activation, "observer": observer},), about


def _cache(text: str, about: str) -> tuple[tuple[dict[str, str], ...], str]:
    return ({"op": CACHE, "weight": text},), about


def _all(linear: str, rest: str, about: str) -> tuple[tuple[dict[str, str], ...], str]:
    return ({"weight": linear}, {"op": "head|embedding", "weight": rest}), about


# Rules as plain data: a Rule checks its formats when it is made, and an import should not parse formats.
_NAMED: dict[str, tuple[tuple[dict[str, str], ...], str]] = {
    "none": ((), "nothing is quantized"),
    "int8": _weights("int8", "linears int8, one scale a row"),
    "int8_all": _all("int8", "int8", "int8, and head and embedding int8 too"),
    # Narrow: with 127.5 steps to the largest, a positive largest weight is always stored smaller. In a
    # depthwise convolution, whose channel may be that one weight, channels lose 0.4 %, layer after layer.
    "int8_conv": (
        ({"op": "linear", "weight": "int8"}, {"op": "conv", "weight": "int8[narrow]"}),
        "linears and convolutions int8, one scale a row",
    ),
    "int8_dynamic": _both(
        "int8", "int8", "linears int8 with int8 activations, one scale a token chosen in each call"
    ),
    "int8_static": (
        (
            {"op": "linear", "weight": "int8", "input": "int8[tensor]", "observer": "minmax"},
            {"op": "conv", "weight": "int8[narrow]", "input": "int8[tensor]", "observer": "minmax"},
        ),
        "linears and convolutions int8 with int8 activations of calibrated range",
    ),
    "int4": _weights("int4[g128]", "linears int4, symmetric, a bf16 scale for each 128"),
    "int4_all": _all("int4[g128]", "int8", "linears int4[g128]; head and embedding int8"),
    "int4_dynamic": _both(
        "int4[g128]", "int8", "linears int4[g128] with int8 activations, one scale a token"
    ),
    "fp8": _weights("float8_e4m3fn", "linears float8_e4m3fn, one scale a row"),
    "fp8_dynamic": _both(
        "float8_e4m3fn", "float8_e4m3fn", "linears float8_e4m3fn with such activations, one scale a token"
    ),
    "fp8_static": _both(
        "float8_e4m3fn",
        "float8_e4m3fn[tensor]",
        "linears float8_e4m3fn with activations of calibrated range",
        "minmax",
    ),
    "mxfp8": _weights("mxfp8", "linears in OCP MX, 8-bit e4m3, a power-of-two scale for each 32"),
    "mxfp8_dynamic": _both("mxfp8", "mxfp8", "linears and their activations in mxfp8"),
    "mxfp6": _weights("mxfp6_e2m3", "linears in OCP MX, 6-bit e2m3"),
    "mxfp4": _weights("mxfp4", "linears in OCP MX, 4-bit e2m1"),
    "mxfp4_dynamic": _both("mxfp4", "mxfp4", "linears and their activations in mxfp4"),
    "nvfp4": _weights("nvfp4", "linears in NVFP4, two levels of scales"),
    "nf4": _weights("nf4[g64]", "linears nf4, a scale for each 64"),
    "ternary": _weights("ternary", "linears of -1, 0 and 1"),
    "kv_int8": _cache("int8[bf16]", "KV caches int8, a bf16 scale a token and head; nothing else"),
    "kv_int4": _cache(
        "int4[g32]", "KV caches int4, a bf16 scale for each 32 numbers of a token; nothing else"
    ),
    "kv_fp8": _cache("float8_e4m3fn[bf16]", "KV caches float8_e4m3fn, a bf16 scale a token and head"),
    "q4_0": _weights("q4_0", "linears in GGUF's Q4_0"),
    "q4_1": _weights("q4_1", "linears in GGUF's Q4_1"),
    "q8_0": _weights("q8_0", "linears in GGUF's Q8_0"),
    STORED: (
        ({"op": _EVERYTHING, "weight": STORED},),
        "every layer that came quantized, in the codes of its checkpoint",
    ),
}


def _named(name: str) -> Recipe:
    rules, about = _NAMED[name]
    return Recipe(name, tuple(Rule(**rule) for rule in rules), about)
