"""Regions that are alike are compiled once: thirty layers of a transformer have seven kinds of linear.

In: a lowered graph with outlined regions. Out: the same graph, in which regions that occur several times are
calls of one subgraph (torch's `invoke_subgraph`); the rest stay as they are.

    fused_q_0(x, codes0, scales0), .., fused_q_29(x, codes29, scales29)
    ->  invoke_subgraph(alike_0, "..", x, codes0, scales0), .., the same alike_0 for all thirty

Two regions are alike when their graphs read the same and their inputs have the same shapes, dtypes, strides
and devices. What a region costs is that Inductor does not fuse over its border: it holds a matmul with its
prologue and epilogue, past which there is little to fuse on a processor.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..passes.edit import free_name
from ..passes.fuse import region_of

# Fewer calls than this, and a subgraph of its own saves nothing.
FEWEST = 2
KERNELS = (torch.ops.bitfold.fused.default, torch.ops.bitfold.conv.default)


def share_regions(gm: GraphModule) -> int:
    """Rewrites the graph; returns the number of calls that share a subgraph."""
    alike: dict[object, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        region = region_of(gm, node)
        if region is not None and (key := _key(region)) is not None:
            alike[key].append(node)
    shared = 0
    for calls in alike.values():
        if len(calls) >= FEWEST:
            _share(gm, calls)
            shared += len(calls)
    return shared


def _key(region: GraphModule) -> object:
    """Equal for regions that are alike; None for one that cannot be a subgraph."""
    # A kernel is compiled apart from the graph, and operations around it may yet become part of it.
    return alike(region.graph, kernels=False)


def alike(graph: Graph, *, kernels: bool) -> object:
    """Equal for graphs that read the same and whose inputs are described alike; None for one that holds more
    than operators on tensors of known sizes, or kernels where there may be none."""
    names: dict[Node, int] = {}
    found: list[object] = []
    for index, node in enumerate(graph.nodes):
        names[node] = index
        if node.op in ("get_attr", "call_module"):
            return None
        if node.target in KERNELS and not kernels:
            return None
        arguments = _placed((node.args, node.kwargs), names)
        value = described(node.meta.get("val")) if node.op == "placeholder" else ()
        if value is None:
            return None
        target = "" if node.op == "placeholder" else node.target
        found.append((node.op, target, repr(arguments), value))
    return tuple(found)


def _placed(arguments: Any, names: dict[Node, int]) -> Any:
    """The arguments with each node replaced by where it stands."""

    def place(node: Node) -> Any:
        return _Place(names[node])

    return torch.fx.node.map_arg(arguments, place)


class _Place:
    """A node, by where it stands."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"%{self.index}"


def described(value: Any) -> object:
    """Shape, strides, dtype and device of a tensor of known sizes; None for anything else."""
    if not isinstance(value, Tensor):
        return None
    sizes = (*value.shape, *value.stride())
    if not all(isinstance(size, int) for size in sizes):
        return None
    return (*sizes, value.dtype, value.device, value.requires_grad)


def _share(gm: GraphModule, calls: list[Node]) -> None:
    body = region_of(gm, calls[0])
    assert body is not None
    name = free_name(gm, "alike")
    output = body.graph.output_node()
    output.args = ((output.args[0],),)
    body.recompile()
    setattr(gm, name, body)
    for call in calls:
        value = call.meta["val"]
        with gm.graph.inserting_before(call):
            subgraph = gm.graph.get_attr(name)
            made = gm.graph.call_function(
                torch.ops.higher_order.invoke_subgraph, (subgraph, name, *call.args)
            )
            made.meta["val"] = (value,)
            new = gm.graph.call_function(operator.getitem, (made, 0))
            new.meta.update(call.meta)
        call.replace_all_uses_with(new)
        gm.graph.erase_node(call)
        if str(call.target) != name:
            gm.delete_submodule(str(call.target))
