"""Flatten: what `torch.export` keeps as a graph within the graph, for gradient modes, becomes plain nodes.

Comes in: a graph in which a `with torch.no_grad()` block is a called subgraph. Goes out: the block's own
nodes in its place, its results detached, which is what the block meant.

    y = wrap_with_set_grad_enabled(False, self.submod_1, x);  z = y[0]   ->   c = cos(x);  z = detach(c)

A block that turns gradients *on* within one that has them off, or that holds tensors of its own, stays as it
is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..core import Miss
from ..edit import call
from ..stages import find_attribute

_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_no_grad(gm: GraphModule) -> int:
    """Put every `no_grad` block of `gm` in line; return how many."""
    found = [node for node in gm.graph.nodes if node.target is _GRAD_MODE]
    return sum(1 for node in found if _inline(gm, node))


def _inline(gm: GraphModule, node: Node) -> bool | Miss:
    enabled, holder, *operands = node.args
    body = find_attribute(gm, str(holder.target)) if isinstance(holder, Node) else None
    if enabled is not False or not isinstance(body, GraphModule):
        return Miss("the block turns gradients on")
    if not all(user.target is operator.getitem for user in node.users):
        return Miss("the block's results are used as one value")
    inline_no_grad(body)
    if any(inner.op in ("get_attr", "call_module") for inner in body.graph.nodes):
        return Miss("the block holds tensors of its own")
    results = _copy_in(gm, node, body, operands)
    for user in list(node.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return True


def _copy_in(gm: GraphModule, node: Node, body: GraphModule, operands: list[Any]) -> list[Any]:
    """Copy the block's nodes before `node`; its results, detached."""
    twin: dict[Node, Any] = {}
    given = iter(operands)
    results: list[Any] = []
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            twin[inner] = next(given)
        elif inner.op == "output":
            results = [twin.get(value, value) for value in inner.args[0]]
        else:
            with gm.graph.inserting_before(node):
                twin[inner] = gm.graph.node_copy(inner, twin.__getitem__)
    return [_detached(gm, value, node) for value in results]


def _detached(gm: GraphModule, value: Any, before: Node) -> Any:
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    return call(gm, torch.ops.aten.detach.default, (value,), before=before, origin_from=value)
