"""What nodes of parameters alone give in evaluation: the numbers that a weight's quantizer reads now.

In: a node of a graph that trains, and what its leaves hold (attributes of the graph, or tensors of the module
that the graph's inputs are). Out: its value, with batch norm folded in by its running statistics.

    evaluated(getitem(fold_norm(%w, %b, ..), 0), leaf)   ->   the folded rows
    evaluated(linear(%x, ..), leaf)                      ->   None: %x is known in a call only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ...formats.norm import FOLD
from ..stages import find_attribute

FOLD_NORM = torch.ops.bitfold.fold_norm.default


def evaluated(node: Node, leaf: Callable[[Node], Tensor | None]) -> Any:
    """The value of a node; None if a leaf below it holds nothing."""
    known: dict[Node, Any] = {}
    return _value(node, leaf, known) if _told(node, leaf, known) else None


def attribute_of(gm: GraphModule) -> Callable[[Node], Tensor | None]:
    """What leaves of a graph over its own tensors hold."""

    def leaf(node: Node) -> Tensor | None:
        if node.op != "get_attr":
            return None
        found = find_attribute(gm, str(node.target))
        return found.detach() if isinstance(found, Tensor) else None

    return leaf


def _told(node: Node, leaf: Callable[[Node], Tensor | None], known: dict[Node, Any]) -> bool:
    if node.op != "call_function":
        known[node] = leaf(node)
        return known[node] is not None
    return all(source in known or _told(source, leaf, known) for source in _read(node))


def _read(node: Node) -> list[Node]:
    found: list[Node] = []
    map_arg(_arguments(node), found.append)
    return found


def _arguments(node: Node) -> tuple[Any, Any]:
    # What follows is whether the batch counts.
    args = node.args[: FOLD["training"]] if node.target is FOLD_NORM else node.args
    return args, node.kwargs


def _value(node: Node, leaf: Callable[[Node], Tensor | None], known: dict[Node, Any]) -> Any:
    if node not in known:
        args, kwargs = map_arg(_arguments(node), lambda source: _value(source, leaf, known))
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
