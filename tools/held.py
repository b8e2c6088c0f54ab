"""The model's own tensors in a graph: their bytes, and those that the graph writes to.

In: a graph of any scope. Out: the nodes that read such tensors; the bytes of all, shared ones once; a block
behind which counters, statistics and caches are what they were.

    held_bytes(gm)   ->   538060032
    with as_it_was(gm, inputs): gm(*inputs)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..passes import state
from ..passes.constants import mutated
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


@contextmanager
def as_it_was(gm: GraphModule, inputs: Sequence[Any]) -> Iterator[None]:
    """To run a graph as often as one likes: its own tensors and its inputs that it writes to are put back."""
    names = mutated(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    attributes = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")} & names
    written = [find_attribute(gm, name) for name in sorted(attributes)]
    written += [given for node, given in zip(placeholders, inputs, strict=False) if node.name in names]
    before = [(tensor, tensor.clone()) for tensor in written if isinstance(tensor, Tensor)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
