"""Signs: which values of a graph are never negative, whatever the inputs are.

In: a graph. Out: a set of nodes. NaN is no negative number, and its code is 0.

    relu(x), max_pool2d(relu(x)), quantize(relu(x), "int8[tensor]", [s])[0]
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from ...passes.edit import argument
from .moved_codes import JOINS, MOVES, scales_of, static

aten = torch.ops.aten
_NEVER = frozenset({aten.relu.default, aten.relu6.default, aten.sigmoid.default, aten.hardsigmoid.default})
_KEEPS = MOVES | {aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.dropout.default}
_BOTH = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.maximum.default})
# Ends of what is left of x, and what they are if a call does not say. Where they cross, the upper one wins.
_BOUNDS = {
    aten.clamp.default: (("min", None), ("max", None)),
    aten.hardtanh.default: (("min_val", -1.0), ("max_val", 1.0)),
    aten.clamp_min.default: (("min", None), ("max", None)),
}


def not_negative(gm: GraphModule) -> set[Node]:
    """Nodes whose values, numbers or codes of int8 with a scale above 0, have no negative one among them."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and _holds(node, found):
            found.add(node)
    return found


def _holds(node: Node, found: set[Node]) -> bool:
    target = node.target
    if target in _NEVER:
        return True
    if target in _BOUNDS:
        low, high = (argument(node, *bound) for bound in _BOUNDS[target])
        above = high is None or (isinstance(high, int | float) and high >= 0)
        return isinstance(low, int | float) and low >= 0 and above
    if target in _BOTH:
        return len(node.args) == 2 and not node.kwargs and all(_is_one(given, found) for given in node.args)
    if target in JOINS:
        return all(given in found for given in node.all_input_nodes)
    if target in _KEEPS or (target is operator.getitem and node.args[1] == 0) or _symmetric(node):
        return node.args[0] in found
    return False


def _symmetric(node: Node) -> bool:
    """Whether a node quantizes so that what is not negative has codes that are not."""
    return static(node) and len(scales_of(node)) == 1


def _is_one(given: object, found: set[Node]) -> bool:
    return given in found if isinstance(given, Node) else isinstance(given, int | float) and given >= 0
