"""Linears that read their input through a Hadamard transform, whose inverse is in their codes.

In: a site's graph and an anchor. Out: whether it is one; the graph with the operator put in.

    linear(x, w)  ->  linear(hadamard(x), w)        the codes are those of w M, M the transform's matrix
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..passes.anchors import TARGETS
from ..passes.provenance import inherit

HADAMARD = torch.ops.bitfold.hadamard.default


def turned(node: Node) -> bool:
    """Whether the anchor's input goes through the transform."""
    source = node.args[TARGETS[node.target][1]]
    return isinstance(source, Node) and source.target is HADAMARD


def turn(gm: GraphModule, node: Node) -> None:
    """Put the transform before a linear."""
    source = node.args[0]
    assert isinstance(source, Node)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(HADAMARD, (source,))
    new.meta["val"] = source.meta["val"]
    inherit(new, [node])
    node.replace_input_with(source, new)
    gm.recompile()
