"""Insert nodes that already say what they are: value and origin in their meta.

Comes in: a graph, an operator and its arguments. Goes out: the new node, with a fake value computed in the
graph's own fake mode and the provenance of the nodes it stands for.

    w = call(gm, aten.t.default, (weight,), before=matmul, origin_from=matmul)     ->  %t_1 : f32[16, 32]
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from .core import state
from .provenance import inherit
from .stages import operator_name


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The fake mode in which the graph's values were made (a new one for a graph that has none)."""
    here = state(gm)
    if here.fake_mode is None:
        found = next((known for node in gm.graph.nodes if (known := _mode_of(node)) is not None), None)
        here.fake_mode = found or FakeTensorMode(shape_env=ShapeEnv())
    return here.fake_mode


def _mode_of(node: Node) -> FakeTensorMode | None:
    value = node.meta.get("val")
    if isinstance(value, FakeTensor):
        return value.fake_mode
    return detect_fake_mode(value) if isinstance(value, (list, tuple)) else None


def fake_value(gm: GraphModule, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `target` gives for the fake values of its arguments."""

    def value(node: Node) -> Any:
        if "val" not in node.meta:
            raise RuntimeError(f"node '{node.name}' has no meta['val'], so no value can be computed from it")
        return node.meta["val"]

    # No autograd graph is wanted on fake values: it would keep every intermediate alive.
    with fake_mode(gm), torch.no_grad():
        return target(*map_arg(args, value), **map_arg(kwargs, value))


def call(
    gm: GraphModule,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    before: Node | None = None,
    after: Node | None = None,
    origin_from: Node | Iterable[Node],
) -> Node:
    """Insert `target(*args, **kwargs)` before or after a node; the new node has its value and origin."""
    if (before is None) == (after is None):
        raise ValueError("call() inserts either before a node or after one: give exactly one of the two")
    place = gm.graph.inserting_before(before) if before is not None else gm.graph.inserting_after(after)
    with place:
        node = gm.graph.create_node("call_function", target, args, kwargs or {}, name=_short_name(target))
    node.meta["val"] = fake_value(gm, target, args, kwargs or {})
    return inherit(node, [origin_from] if isinstance(origin_from, Node) else origin_from)


def _short_name(target: Callable[..., Any]) -> str | None:
    """`linear` for `aten.linear.default`: what fx calls it when it captures."""
    name = operator_name(target)
    return name.rpartition("::")[2] or None


def free_name(gm: GraphModule, name: str) -> str:
    """`name` as one identifier that `gm` does not have yet: a graph's code may spell it as a variable."""
    plain = re.sub(r"\W", "_", name) or "root"
    plain = f"_{plain}" if plain[0].isdigit() or keyword.iskeyword(plain) else plain
    free, count = plain, 0
    while hasattr(gm, free):
        count += 1
        free = f"{plain}_{count}"
    return free


def argument(node: Node, name: str, default: Any = None) -> Any:
    """The argument called `name` of an operator's call, wherever it stands; `default` if not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    for index, parameter in enumerate(schema.arguments if schema is not None else ()):
        if parameter.name == name and index < len(node.args):
            return node.args[index]
    return default


def arguments(node: Node) -> list[Any]:
    """Every argument of a node that calls an operator, in the order of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *node.kwargs.values()]
    given = list(node.args)
    for parameter in schema.arguments[len(given) :]:
        given.append(node.kwargs.get(parameter.name, parameter.default_value))
    return given


def replace(old: Node, new: Node) -> None:
    """Let every user of `old` use `new`, then erase `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
