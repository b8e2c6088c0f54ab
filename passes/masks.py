"""Masks: what hides scores from a softmax, found before the scores take a format.

In: a captured graph and a softmax in it. Out: the node that hides scores, or None.

    %w = matmul(%q, %k); %m = where(%visible, 0, -inf); softmax(%w + %m)    ->    %m
    softmax(%w + embedding(%distance))                                     ->    None, a bias of positions

A hidden score stands for minus infinity. One scale for it and for the scores beside it leaves these nothing:
in int8 they are all 0, and attention is even. So a softmax behind a mask stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .constants import VIEWS, value_of

aten = torch.ops.aten
_HIDES = frozenset(
    {
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar),
        *(aten.masked_fill_.Tensor, aten.where.self, aten.where.Scalar, aten.where.ScalarOther),
        aten.where.ScalarSelf,
    }
)
_SUMS = frozenset(
    {
        *(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.rsub.Tensor),
        *(aten.maximum.default, aten.max.other),
    }
)
# What leaves scores scores: views and casts, and a number that all are multiplied by.
_SAME = VIEWS | {
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor, aten.mul.Scalar),
    *(aten.dropout.default, aten.clamp.default, aten.tanh.default),
}
_LEARNED = frozenset(
    {
        *(aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default),
        *(aten.baddbmm.default, aten.addmm.default, aten.embedding.default, aten.conv1d.default),
        *(aten.conv2d.default, aten.conv3d.default),
    }
)
SPREAD = 16.0
"""e^-16 is the eps of float32: a constant that lies further below the largest hides what it is added to."""


def learned(gm: GraphModule) -> set[Node]:
    """What the model computes by products or looks up; a mask is made of sizes, arguments and comparisons."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.target in _LEARNED or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def mask_of(gm: GraphModule, softmax: Node, learned: set[Node], constants: set[Node]) -> Node | None:
    """The node that hides scores from `softmax`, if there is one."""
    seen: set[Node] = set()
    stack = list(softmax.all_input_nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _HIDES and node not in constants:
            return node
        if node.target in _SUMS:
            parts = node.all_input_nodes
            for part in parts:
                alone = part not in learned and any(other in learned for other in parts)
                if alone and (part not in constants or _spreads(gm, part)):
                    return part
            stack += parts
        elif node.target in _SAME:
            stack += node.all_input_nodes
    return None


def _spreads(gm: GraphModule, constant: Node) -> bool:
    values: dict[Node, object] = {}
    found = value_of(gm, constant, values)
    if not isinstance(found, Tensor) or not found.numel():
        return False
    low, high = torch.aminmax(found.float())
    return not float(high - low) < SPREAD  # -inf from -inf is NaN
