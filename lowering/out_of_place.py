"""Out of place: an operation that writes into a result which nothing else reads might as well make a new one.

In: a lowered graph. Out: the same numbers, without those writes, past which nothing may be moved.

    %b = batch_norm(%y, ..); %z = relu_(%b)    ->    %z = relu(%b)        (nn.ReLU(inplace=True))

A result is looked at only if its operator says that it is a tensor of its own.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from ..passes.shared_memory import RETURNS_ITS_INPUT

aten = torch.ops.aten
_PLAIN: dict[object, object] = {
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.silu_.default: aten.silu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.clamp_.default: aten.clamp.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
}


def out_of_place(gm: GraphModule) -> int:
    """Number of operations that write to nothing any more."""
    found = 0
    for node in gm.graph.nodes:
        source = node.args[0] if node.target in _PLAIN else None
        if isinstance(source, Node) and set(source.users) == {node} and _its_own(source):
            node.target = _PLAIN[node.target]
            found += 1
    return found


def _its_own(node: Node) -> bool:
    """Whether a value is a tensor that no other value shares memory with."""
    made = node.args[0] if node.target is operator.getitem else node
    if (
        not isinstance(made, Node)
        or not isinstance(made.target, torch._ops.OpOverload)
        or made.target in RETURNS_ITS_INPUT
    ):
        return False
    return all(result.alias_info is None for result in made.target._schema.returns)
