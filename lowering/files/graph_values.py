"""A graph's operators and arguments as plain JSON data, and back: the vocabulary of a saved graph.

In: what an fx node holds. Out: JSON values; and for JSON values, what they stand for. A file is data, never
code: an operator is found by its name in tables and namespaces named here, a name must be a plain identifier
(fx prints names into the source that it compiles), and everything else is refused with one sentence.

    torch.ops.aten.linear.default   <->  "aten.linear.default"
    (node x, torch.float32, 2.0)    <->  {"tuple": [{"node": "x"}, {"dtype": "float32"}, 2.0]}
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from ...formats import BitfoldError

NAMESPACES = ("aten", "bitfold", "prims")

# Named in full: `operator` as a whole also holds `methodcaller` and `attrgetter`.
_OPERATORS = (
    *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "lshift", "rshift"),
)
_SYMBOLIC = ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_float", "sym_int", "sym_sqrt", "sym_sum")
_MATH = ("ceil", "floor", "trunc", "sqrt")
_HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond")

# Operators that touch files: a graph from a stranger must not reach them.
_REFUSED = ("from_file", "save", "load")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC if hasattr(torch, name)},
    **{f"math.{name}": getattr(math, name) for name in _MATH},
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}


class GraphDataError(BitfoldError):
    """A graph that cannot be written as data, or data that is not a graph."""


def plain_name(text: object) -> str:
    """`text` if it may stand in a graph as a name; raises GraphDataError otherwise."""
    if not isinstance(text, str) or not _NAME.match(text):
        raise GraphDataError(f"{text!r} is not a name, so the graph in this file cannot be trusted")
    return text


def plain_path(text: object) -> str:
    """`text` if it is a dotted path of plain names; raises GraphDataError otherwise."""
    if not isinstance(text, str) or not _PATH.match(text):
        raise GraphDataError(f"{text!r} is not a path of names, so the graph in this file cannot be trusted")
    return text


def target_name(target: Any) -> str:
    """The name under which `target_of` finds the function of a call again."""
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
        if target.namespace not in NAMESPACES:
            raise GraphDataError(
                f"operator {name} cannot be saved: a file may use the namespaces {', '.join(NAMESPACES)} "
                "only; save the graph before the pass that brought it in"
            )
        return name
    if isinstance(target, torch._ops.HigherOrderOperator) and str(target) in _HIGHER_ORDER:
        return f"higher_order.{target}"
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise GraphDataError(f"{target!r} cannot be saved: it is no operator that a file may name")


def target_of(name: object) -> Any:
    """The function that `target_name` named. Only what is allowed is ever looked up."""
    if isinstance(name, str):
        if name in _FUNCTIONS:
            return _FUNCTIONS[name]
        namespace, _, rest = name.partition(".")
        if namespace == "higher_order" and rest in _HIGHER_ORDER:
            return getattr(torch.ops.higher_order, rest)
        operation, _, overload = rest.partition(".")
        if namespace in NAMESPACES and _NAME.match(operation) and _NAME.match(overload):
            return _overload(name, namespace, operation, overload)
    raise GraphDataError(f"the file's graph calls {name!r}, which is not an operator that a file may call")


def _overload(name: str, namespace: str, operation: str, overload: str) -> Any:
    if operation in _REFUSED:
        raise GraphDataError(f"the file's graph calls {name}, which a file may not call")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    except AttributeError as error:
        raise GraphDataError(
            f"the file's graph calls {name}, which torch {torch.__version__} does not have; import the "
            "package that registers it, or use the version of torch that saved the file"
        ) from error


def encode(value: Any, name: Callable[[Node], str]) -> Any:
    """One argument of a node as JSON data; nodes by the `name` that they are given."""

    def inner(part: Any) -> Any:
        return encode(part, name)

    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Node):
        return {"node": name(value)}
    if isinstance(value, int) and not isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):
        return {"tuple": [inner(part) for part in value]}
    if isinstance(value, list):
        return [inner(part) for part in value]
    if isinstance(value, dict):
        return {"dict": [[inner(key), inner(part)] for key, part in value.items()]}
    if isinstance(value, slice):
        return {"slice": [inner(value.start), inner(value.stop), inner(value.step)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, known in _ENUMS.items():
        if isinstance(value, known):
            return {kind: str(value).removeprefix("torch.")}
    raise GraphDataError(f"an argument of type {type(value).__name__} cannot be saved: {value!r}")


def decode(data: Any, nodes: Mapping[str, Node], device: torch.device | None = None) -> Any:
    """The argument that `encode` wrote. `device` takes the place of every device that the graph names."""
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(part, nodes, device) for part in data]
    if isinstance(data, dict) and len(data) == 1:
        ((kind, content),) = data.items()
        if kind == "node" and content in nodes:
            return nodes[content]
        if kind == "tuple":
            return tuple(decode(part, nodes, device) for part in content)
        if kind == "dict":
            return {decode(key, nodes, device): decode(part, nodes, device) for key, part in content}
        if kind == "slice":
            return slice(*(decode(part, nodes, device) for part in content))
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "complex":
            return complex(*content)
        if kind == "device":
            return device or torch.device(content)
        if kind in _ENUMS:
            return enum_value(kind, content)
    raise GraphDataError(f"the graph in this file has an argument that means nothing: {data!r}")


_ENUMS: dict[str, type] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}


def enum_value(kind: str, name: object) -> Any:
    """`enum_value("dtype", "float32")` is torch.float32; raises GraphDataError for what torch has not."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, _ENUMS[kind]):
        raise GraphDataError(
            f"torch {torch.__version__} has no {kind} {name!r}, which the graph in this file uses"
        )
    return found
