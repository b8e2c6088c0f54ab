"""KV caches in codes, in main memory: a generated kernel reads them, Inductor's loops write them.

In: a graph. Out: the same without operators that would call Python in each step.

    cache_write([%kc, %ks, ..], %k, %v, %positions, None, "attention 9/3x64 f32 ..")
    %y = attend(%q, [%kc, %ks, ..], %limits, None, None, "attention 9/3x64 f32 ..")
    ->  what `cache_write_reference` does, operator by operator: a scale, codes, index_put_
        %y = attend_few(%q, [%kc, %ks, ..], %limits, None, None, "attention 9/3x64 f32 ..")

Many queries (a prompt) keep `attend`, which decodes the cache once and calls torch's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ...codegen.attention import AttentionSpec
from ...passes import inherit
from ...passes.edit import fake_mode
from ..kv_cache.attention import MOST_QUERIES, cache_write_reference, parsed

ATTEND = torch.ops.bitfold.attend.default
ATTEND_FEW = torch.ops.bitfold.attend_few.default
CACHE_WRITE = torch.ops.bitfold.cache_write.default


def lower_caches(gm: GraphModule) -> list[AttentionSpec]:
    """Rewrites the graph; returns what the kernels that it calls compute."""
    specs = []
    for node in gm.graph.find_nodes(op="call_function", target=ATTEND):
        shape: Any = node.args[0].meta["val"].shape
        if isinstance(shape[2], int) and 0 < shape[2] <= MOST_QUERIES and shape.numel() > 0:
            node.target = ATTEND_FEW
            specs.append(parsed(str(node.args[5])))
    for node in list(gm.graph.find_nodes(op="call_function", target=CACHE_WRITE)):
        _written(gm, node)
    return specs


def _written(gm: GraphModule, node: Node) -> None:
    """The write in torch's own operators, in the node's place."""
    inputs = node.all_input_nodes
    place = {given: i for i, given in enumerate(inputs)}

    def write(*values: Any) -> tuple[()]:
        given: Any = map_arg(node.args, lambda one: values[place[one]])
        cache_write_reference(*given)
        return ()

    with fake_mode(gm), torch.no_grad():
        traced = make_fx(write)(*[given.meta["val"] for given in inputs])
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(node):
        for made in traced.graph.nodes:
            if made.op == "call_function":
                values[made] = inherit(gm.graph.node_copy(made, values.__getitem__), [node])
    gm.graph.erase_node(node)
