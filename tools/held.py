"""The model's own tensors in a graph, and their bytes.

In: a graph of any scope. Out: the nodes that read such tensors; the bytes of all, shared ones once.

    held_bytes(gm)   ->   538060032
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from ..passes import state
from ..passes.stages import find_attribute


def held_tensors(gm: GraphModule) -> dict[Node, Tensor]:
    """By the node that reads one. A frame's parameters are inputs of its graph."""
    held = {node: find_attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    params = state(gm).params
    held |= {n: params[n.name] for n in gm.graph.find_nodes(op="placeholder") if n.name in params}
    return {node: value for node, value in held.items() if isinstance(value, Tensor)}


def held_bytes(gm: GraphModule) -> int:
    """Of parameters, buffers and codes; those that a frame is given count where something reads them."""
    read = [value for node, value in held_tensors(gm).items() if node.users]
    return sum({id(t): t.nbytes for t in (*gm.parameters(), *gm.buffers(), *read)}.values())
