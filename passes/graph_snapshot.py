"""A graph as plain data: names, shapes and texts, never a tensor.

Comes in: a graph. Goes out: a `GraphSnapshot`, which prints as the graph's text, for tests, traces and the
viewer.

    str(snapshot(gm))  ->  x: f32[s0, 16] = input
                           linear: f32[s0, 32] = aten.linear.default(x, w, b)  # int4[g128] weight
                           return (linear,)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .core import META_KEY
from .provenance import FROM_KEY, VIRTUAL_NODE, origin
from .stages import find_attribute, operator_name


@dataclass(frozen=True)
class NodeSnapshot:
    """One node as plain data. `shape` holds ints, and text for symbolic sizes; `bytes` None is unknown."""

    name: str
    op: str
    target: str
    args: str
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    shape: tuple[int | str, ...] | None
    dtype: str
    bytes: int | None
    module_path: str
    source: str
    text: str
    format: str
    note: str
    made_from: tuple[str, ...]
    rule: str = ""  # the recipe's, that decided what the node is to become
    virtual_node: str = ""  # the one that the node is meant for, where a graph is split over several

    def __str__(self) -> str:
        """`linear: f32[s0, 32] = aten.linear.default(x, w, b)`."""
        kind = f": {self.dtype}[{', '.join(map(str, self.shape))}]" if self.shape is not None else ""
        match self.op:
            case "placeholder":
                return f"{self.name}{kind} = input"
            case "get_attr":
                return f"{self.name}{kind} = self.{self.target}"
            case "output":
                return f"return {self.args}"
            case "call_module":
                return f"{self.name}{kind} = self.{self.target}({self.args})"
        return f"{self.name}{kind} = {self.target}({self.args})"


@dataclass(frozen=True)
class GraphSnapshot:
    """A graph as plain data, in execution order."""

    nodes: tuple[NodeSnapshot, ...]

    def __str__(self) -> str:
        """The graph as text, a line a node, annotations after `#`: what snapshot tests compare."""
        return "\n".join(f"{node}" + (f"  # {node.note}" if node.note else "") for node in self.nodes)

    def __iter__(self) -> Iterator[NodeSnapshot]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)


_Seen = tuple[tuple[Any, ...], tuple[Node, ...], NodeSnapshot]
"""What a node held when it was looked at, who used it, and its record."""


class Recorder:
    """Takes snapshots of one graph as it goes through a pipeline, redoing only the nodes that changed."""

    def __init__(self) -> None:
        self._known: dict[Node, _Seen] = {}

    def snapshot(self, gm: GraphModule) -> GraphSnapshot:
        """The graph as it is now."""
        known: dict[Node, _Seen] = {}
        for node in gm.graph.nodes:
            meta = node.meta
            # fx puts new argument tuples in place when an argument changes, so identity tells.
            held = (
                *(node.name, node.target, node.args, node.kwargs),
                *(meta.get("val"), meta.get(META_KEY), meta.get(VIRTUAL_NODE)),
            )
            users = tuple(node.users)
            before = self._known.get(node)
            if before is None or not all(map(operator.is_, before[0], held)):
                shown = _node(gm, node)
            elif before[1] != users:
                shown = replace(before[2], users=tuple(user.name for user in users))
            else:
                shown = before[2]
            known[node] = (held, users, shown)
        self._known = known
        return GraphSnapshot(tuple(shown for _, _, shown in known.values()))


def snapshot(gm: GraphModule) -> GraphSnapshot:
    """The graph as plain data."""
    return Recorder().snapshot(gm)


@dataclass(frozen=True)
class _Kind:
    shape: tuple[int | str, ...] | None = None
    dtype: str = ""
    bytes: int | None = None


_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}


def short_dtype(dtype: torch.dtype) -> str:
    """`f32`, `bf16`, `u8`; other dtypes by their full name."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


@lru_cache(maxsize=4096)
def _expression(size: Any) -> str:
    """A symbolic size as text. Sympy prints slowly, and a graph has few different ones."""
    return str(size)


def _kind(value: Any) -> _Kind:
    if not isinstance(value, Tensor):
        return _Kind(
            dtype=str(value) if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else ""
        )
    shape = tuple(size if isinstance(size, int) else _expression(size.node.expr) for size in value.shape)
    count: int | None = 1
    for size in shape:
        count = count * size if count is not None and isinstance(size, int) else None
    return _Kind(shape, short_dtype(value.dtype), None if count is None else count * value.element_size())


def _node(gm: GraphModule, node: Node) -> NodeSnapshot:
    at, kind = origin(node), _kind(node.meta.get("val"))
    note = node.meta.get(META_KEY)
    return NodeSnapshot(
        name=node.name,
        op=node.op,
        target=target_text(node.target),
        args=_arguments(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        users=tuple(user.name for user in node.users),
        shape=kind.shape,
        dtype=kind.dtype,
        bytes=kind.bytes,
        module_path=at.module_path,
        source=at.where,
        text=at.text,
        format=_format(gm, node),
        note="" if note is None else str(note),
        made_from=tuple(node.meta.get(FROM_KEY, ())),
        rule=getattr(note, "rule", ""),
        virtual_node=str(node.meta.get(VIRTUAL_NODE, "")),
    )


@lru_cache(maxsize=4096)
def target_text(target: Any) -> str:
    """`aten.linear.default`, `getitem`, an attribute's path."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target is operator.getitem:
        return "getitem"
    return operator_name(target) or getattr(target, "__name__", repr(target))


def _arguments(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return ""
    if node.op == "output":
        return _value(node.args[0])
    given = [_value(value) for value in node.args]
    given += [f"{key}={_value(value)}" for key, value in node.kwargs.items()]
    return ", ".join(given)


def _value(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_value, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return short_dtype(value)
    return repr(value)


def _format(gm: GraphModule, node: Node) -> str:
    """The format that a bitfold operator works in, or that a region around one was outlined for."""
    if node.op == "call_module":
        region = find_attribute(gm, str(node.target))
        formats = getattr(getattr(region, "meta", {}).get("bitfold_region"), "formats", None)
        return ", ".join(map(str, formats)) if formats else ""
    if not operator_name(node.target).startswith("bitfold::"):
        return ""
    for index, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == "format":
            return str(node.args[index] if index < len(node.args) else node.kwargs.get("format", ""))
    return ""
