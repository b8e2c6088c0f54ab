"""One line of a recipe: which layers it speaks of, and the formats it gives them.

In: a `Site` (a layer's paths, its op kind, its sizes).  Out: whether the rule matches it.

    Rule(match="*.mlp.*", op="linear", where="K % 128 == 0", weight="int4[g128]")
        matches Site(("model.layers.0.mlp.up_proj",), "linear", n=1536, k=512)
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import lru_cache

from ..formats import BitfoldError, format, nearest
from .observing.kinds import observer

CACHE = "cache"
JOINTS = ("add", "mul", "pool", "softmax", "attention")
"""Operators that take activations alone (`joints.py`)."""
OPS = ("linear", "head", "conv", "embedding", CACHE, *JOINTS)
MISFITS = ("error", "report")
STORED = "stored"

_BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_NAMES = ("N", "K", "numel")


@dataclass(frozen=True)
class Site:
    """A layer as rules see it: the names it goes by, its op kind, N rows of K weights each."""

    paths: tuple[str, ...]
    op: str
    n: int
    k: int
    numel: int


@dataclass(frozen=True)
class Rule:
    """Formats for the layers that match. Formats are text; "" leaves that edge as it is.

    match     a glob on the module path (`*` crosses dots), or `re:` and a regular expression (full match)
    op        linear, head, conv, embedding, several with `|`, or `*`; a head is not a linear;
              cache: a buffer of keys or values, by its own path, its format as `weight`; `*` does not mean it
              add, mul, pool, softmax, attention: operators on activations, their operands' format as `input`;
              `*` does not mean them (program scope; `joints.py`)
    where     a predicate on N (rows), K (the reduced size) and numel: "K >= 256 and N % 16 == 0"
    weight    format of the weight, or "stored": the codes of a checkpoint that came quantized, as they are
    input     format of the input activation; output: of the result
    observer  minmax, average, moving, percentile, mse or entropy: ranges of activations are found by
              calibration. "": in each call
    skip      the reason for leaving these layers alone; excludes all formats
    on_misfit "error", or "report": a layer that cannot take the format is left alone and reported
    """

    match: str = "*"
    op: str = "linear"
    where: str = ""
    weight: str = ""
    input: str = ""
    output: str = ""
    observer: str = ""
    skip: str = ""
    on_misfit: str = "error"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise BitfoldError(f"a rule's {field.name} is text, not {value!r}")
        _choose("op", self.op.split("|"), (*OPS, "*"))
        _choose("on_misfit", [self.on_misfit], MISFITS)
        if self.observer:
            observer(self.observer)
        if self.skip and (self.weight or self.input or self.output):
            raise BitfoldError(f"rule {self.match!r} has both a skip reason and formats; give one of them")
        if not (self.skip or self.weight or self.input or self.output):
            raise BitfoldError(
                f"rule {self.match!r} says nothing; give weight, input or output a format, or a skip reason"
            )
        if self.op == CACHE and (self.input or self.output):
            raise BitfoldError(f"rule {self.match!r} is about a cache; give its format as the weight")
        if self.observer and not (self.input or self.output):
            raise BitfoldError(f"rule {self.match!r} observes nothing; give input or output a format too")
        for edge in ("weight", "input", "output"):
            text = getattr(self, edge)
            if text and not (edge == "weight" and text == STORED):
                object.__setattr__(self, edge, str(format(text)))
        _pattern(self.match)
        _predicate(self.where)

    def matches(self, site: Site) -> bool:
        """True if the op kind, one of the paths and the sizes all fit."""
        if not self.names(site):
            return False
        return _predicate(self.where)({"N": site.n, "K": site.k, "numel": site.numel})

    def names(self, site: Site) -> bool:
        """True if the op kind and one of the paths fit, whatever the sizes."""
        meant = site.op in self.op.split("|") or (self.op == "*" and site.op not in (CACHE, *JOINTS))
        return meant and any(_pattern(self.match)(path) for path in site.paths)

    def to_dict(self) -> dict[str, str]:
        """Plain data; defaults are left out, but `match` and `op` always say whom it concerns."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in given.items() if v != defaults[k] or k in ("match", "op")}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Rule:
        """The rule that `to_dict` wrote. Raises BitfoldError for an unknown key."""
        if not isinstance(data, Mapping):
            raise BitfoldError(
                f"a rule is an object such as {{'op': 'linear', 'weight': 'int8'}}, not {data!r}"
            )
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise BitfoldError(
                    f"unknown key {key!r} in a rule{nearest(str(key), known)}; keys are {', '.join(known)}"
                )
        return cls(**data)  # type: ignore[arg-type]  # each value is checked to be text in __post_init__

    def __str__(self) -> str:
        whom = f"{self.op} {self.match}" + (f" where {self.where}" if self.where else "")
        if self.skip:
            return f"{whom}: left alone ({self.skip})"
        what = [
            f"{edge} {getattr(self, edge)}" for edge in ("weight", "input", "output") if getattr(self, edge)
        ]
        return f"{whom}: {', '.join(what)}" + (f", observed by {self.observer}" if self.observer else "")


def _choose(what: str, given: list[str], allowed: tuple[str, ...]) -> None:
    for one in given:
        if one not in allowed:
            raise BitfoldError(
                f"unknown {what} {one!r}{nearest(one, allowed)}; allowed: {', '.join(allowed)}"
            )


def exactly(path: str) -> str:
    """The `match` that this path alone meets, whatever signs are in its names."""
    return "re:" + re.escape(path) if path.startswith("re:") or set(path) & set("*?[") else path


@lru_cache(maxsize=1024)
def _pattern(text: str) -> Callable[[str], bool]:
    """A test of one path. `re:` introduces a regular expression, anything else is a glob."""
    if not text.startswith("re:"):
        return lambda path: fnmatchcase(path, text)
    try:
        compiled = re.compile(text[3:])
    except re.error as error:
        raise BitfoldError(f"{text!r} is not a regular expression: {error}") from error
    return lambda path: compiled.fullmatch(path) is not None


@lru_cache(maxsize=1024)
def _predicate(text: str) -> Callable[[Mapping[str, int]], bool]:
    """The `where` text as a function. It is read as a syntax tree, never run as Python."""
    if not text:
        return lambda sizes: True
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        # Large sizes for a trial, so that a harmless K - 1 does not divide by zero here.
        _evaluate(tree, text, dict.fromkeys(_NAMES, 1 << 20))
    except BitfoldError:
        raise
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BitfoldError(
            f"where={text!r} cannot be read; write something like 'K >= 256 and N % 16 == 0'"
        ) from error
    return lambda sizes: bool(_evaluate(tree, text, sizes))


def _evaluate(node: ast.expr, text: str, sizes: Mapping[str, int]) -> int:
    def value(part: ast.expr) -> int:
        return _evaluate(part, text, sizes)

    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.BoolOp(op=ast.And(), values=parts):
            # Every part is evaluated, so that a word that is not allowed is found when the rule is made.
            return min(bool(value(part)) for part in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return max(bool(value(part)) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not value(part)
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -value(part)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _divide_safely(_BINARY[type(op)], value(left), value(right), text)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            terms = [value(part) for part in (left, *others)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, terms, terms[1:], strict=False))
    raise BitfoldError(
        f"where={text!r}: {ast.unparse(node)!r} is not allowed; use the names {', '.join(_NAMES)}, whole "
        "numbers, + - * // %, comparisons, and, or, not"
    )


def _divide_safely(op: Callable[[int, int], int], left: int, right: int, text: str) -> int:
    try:
        return op(left, right)
    except ZeroDivisionError as error:
        raise BitfoldError(f"where={text!r} divides by zero") from error
