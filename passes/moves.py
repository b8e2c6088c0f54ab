"""Operators that only move numbers: the same numbers in another shape or order.

In: a node. Out: where its numbers come from.

    %f = flatten(%x, 1); %t = transpose(%f, 0, 1)     source_of(%t) -> %x

What is true of all numbers of the source (a range, a scale) is true of the moved ones.
"""

from __future__ import annotations

import torch
from torch.fx import Node

aten = torch.ops.aten

# All numbers of the source, each once.
REORDERS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.channel_shuffle.default,
        aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
    }
)


def source_of(node: Node) -> Node:
    """The node whose numbers `node` has in another shape or order; itself if it makes its own."""
    while node.op == "call_function" and node.target in REORDERS:
        given = node.args[0]
        if not isinstance(given, Node):
            return node
        node = given
    return node
