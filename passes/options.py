"""Passes and their options as text, both ways.

Comes in: `annotate{recipe=int4[g64], tied=false},fold` or a pass. Goes out: the passes, or the text.

    print_pass(Annotate(recipe="a,b"))  ->  annotate{recipe="a,b"}

Options are the fields of the pass's dataclass; their declared types (bool, int, float, str, None, tuples of
these, Literal, Enum, or a class with a `parse`) say how the text is read.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Literal, Union

from ..formats.errors import BitfoldError, nearest
from .core import Pass

_OPEN, _CLOSE = "([{", ")]}"


def parse_passes(text: str, find: Callable[[str], type[Pass]]) -> list[Pass]:
    """The passes that `text` names, in order."""
    return [_parse_pass(part.strip(), find) for part in split_top(text) if part.strip()]


def split_options(text: str) -> tuple[str, str]:
    """`fold{a=1}` -> ("fold", "a=1")."""
    name, brace, rest = text.partition("{")
    if brace and not rest.rstrip().endswith("}"):
        raise BitfoldError(f"'{text}' has no closing brace; a pass is written name{{option=value,...}}")
    return name.strip(), rest.rstrip()[:-1] if brace else ""


def _parse_pass(text: str, find: Callable[[str], type[Pass]]) -> Pass:
    name, inside = split_options(text)
    cls = find(name)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for part in split_top(inside):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals:
            raise BitfoldError(f"'{part.strip()}' in '{text}' is not an option; write {name}{{option=value}}")
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise BitfoldError(
                f"the pass '{name}' has no option '{key}'{nearest(key, fields)} (it has: {known})"
            )
        if key in given:
            raise BitfoldError(f"the option '{key}' of '{name}' is given twice")
        given[key] = _read(_unquote(value.strip()), hints[key], f"{name}{{{key}}}")
    missing = [key for key, field in fields.items() if key not in given and _required(field)]
    if missing:
        raise BitfoldError(f"the pass '{name}' needs {missing[0]}; write {name}{{{missing[0]}=...}}")
    return cls(**given)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def print_pass(given: Pass) -> str:
    """The text that parses to `given`; options at their default are left out."""
    shown = []
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if not field.init or (not _required(field) and value == _default(field)):
            continue
        shown.append(f"{field.name}={_quote(_write(value))}")
    return f"{given.name}{{{','.join(shown)}}}" if shown else given.name


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def split_top(text: str, mark: str = ",") -> Iterator[str]:
    """The parts of `text` between commas that stand in no bracket and no double quotes."""
    depth, start, quoted, escaped = 0, 0, False, False
    for at, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
            continue
        if char == '"':
            quoted = True
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif char == mark and depth == 0:
            yield text[start:at]
            start = at + 1
    if depth != 0 or quoted:
        what = "quotes" if quoted else "brackets"
        raise BitfoldError(
            f"the {what} in '{text}' do not match; put a value that holds them in double quotes"
        )
    yield text[start:]


def _quote(text: str) -> str:
    if text and text == text.strip() and '"' not in text and "\\" not in text:
        try:
            if len(list(split_top(text))) == 1 and _balanced(text):
                return text
        except BitfoldError:
            pass
    return json.dumps(text)


def _balanced(text: str) -> bool:
    """Whether no bracket closes before it was opened."""
    depth = 0
    for char in text:
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _unquote(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except json.JSONDecodeError as error:
        raise BitfoldError(f"the quoted value {text} is not a JSON string: {error.msg}") from error


def _write(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, tuple):
        return "[" + ",".join(_quote(_write(item)) for item in value) + "]"
    return str(value)


def _read(text: str, wanted: Any, where: str) -> Any:
    """`text` as the declared type `wanted`; BitfoldError naming the option when it cannot be read so."""
    kind = typing.get_origin(wanted)
    if kind in (Union, types.UnionType):
        return _read_union(text, typing.get_args(wanted), where)
    if kind is Literal:
        return _read_literal(text, typing.get_args(wanted), where)
    if kind is tuple or wanted is tuple:
        return _read_tuple(text, wanted, where)
    if wanted is bool:
        return _read_literal(text.lower(), ("true", "false"), where) == "true"
    if wanted in (int, float):
        return _read_number(text, wanted, where)
    if wanted is str or wanted is Any:
        return text
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return wanted[_read_literal(text, tuple(wanted.__members__), where)]
    parse = getattr(wanted, "parse", None)
    if parse is not None:
        return parse(text)
    raise BitfoldError(f"the option {where} cannot be written as text; set it in Python")


def _read_union(text: str, choices: tuple[Any, ...], where: str) -> Any:
    if type(None) in choices and text.lower() == "none":
        return None
    kinds = [choice for choice in choices if choice is not type(None)]
    # The narrowest reading first: a number before a text.
    kinds.sort(key=lambda choice: (choice is str, choice is not bool))
    for choice in kinds[:-1]:
        try:
            return _read(text, choice, where)
        except BitfoldError:
            continue
    return _read(text, kinds[-1], where)


def _read_literal(text: str, choices: tuple[Any, ...], where: str) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    allowed = ", ".join(map(str, choices))
    raise BitfoldError(f"{where} is '{text}'; it may be {allowed}")


def _read_number(text: str, wanted: type, where: str) -> Any:
    try:
        return wanted(text)
    except ValueError as error:
        name = "a whole number" if wanted is int else "a number"
        raise BitfoldError(f"{where} is '{text}'; it must be {name}") from error


def _read_tuple(text: str, wanted: Any, where: str) -> tuple[Any, ...]:
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    items = typing.get_args(wanted) or (str, ...)
    return tuple(_read(_unquote(part.strip()), items[0], where) for part in split_top(inside) if part.strip())
