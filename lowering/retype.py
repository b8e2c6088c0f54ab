"""A folded graph for another compute dtype: what `.to(dtype)` does to a folded module.

In: the graph, as data and as the body that runs, and two dtypes. Out: the same graph with every weight
decoded to the new dtype. Codes and scales stay as they are.

    dequantize([%codes, %scales], "int4[g128]", 576, float32)  ->  dequantize(..., 576, bfloat16)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ..codegen import runs_on_kernels
from ..codegen.lanes import LANE_TYPES
from ..codegen.spec import type_name
from .cpu.static import cast
from .files.graph_data import Data
from .fused import parsed
from .splice import expanded

_CHANGED = "bitfold_changed"
"""In the meta of a body: what `changed_body` made of it."""


def retyped(data: Data, old: torch.dtype, new: torch.dtype) -> Data:
    """The same graph for inputs and decoded weights of dtype `new` where they were `old`."""
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in (old, new)}

    def changed(node: Data) -> Data:
        if node["op"] == "placeholder" and node["val"].get("dtype") == names[old]:
            return {**node, "val": {**node["val"], "dtype": names[new]}}
        if node.get("target") == "bitfold.dequantize.default" and node["args"][3] == {"dtype": names[old]}:
            return {**node, "args": [*node["args"][:3], {"dtype": names[new]}, *node["args"][4:]]}
        return node

    return {**data, "nodes": [changed(node) for node in data["nodes"]]}


def retyped_body(body: GraphModule, old: torch.dtype, new: torch.dtype) -> GraphModule:
    """The body with every `dequantize` to `old` decoding to `new`."""
    return changed_body(body, (old, new), lambda twin: _retype(twin, old, new))


def changed_body(body: GraphModule, key: Hashable, change: Callable[[GraphModule], None]) -> GraphModule:
    """The body changed: another one, which all modules that had this body get for the same key, so that they
    stay one to the compiler.
    """
    made: dict[Hashable, GraphModule] = body.meta.setdefault(_CHANGED, {})
    if key not in made:
        twin = GraphModule(body, copy.deepcopy(body.graph))
        for name, child in body.named_children():
            twin.add_module(name, copy.deepcopy(child))
        change(twin)
        made[key] = twin
    return made[key]


def _retype(body: GraphModule, old: torch.dtype, new: torch.dtype) -> None:
    changed = False
    for node in list(body.graph.nodes):
        if node.op == "call_module":
            inner = body.get_submodule(str(node.target))
            if isinstance(inner, GraphModule):
                _retype(inner, old, new)
        elif node.target == torch.ops.bitfold.dequantize.default and node.args[3] == old:
            node.args = (*node.args[:3], new)
            changed = True
        elif node.target == torch.ops.bitfold.fused.default:
            changed |= _rewrite_kernel(body, node, old, new)
        elif node.target == torch.ops.bitfold.conv.default:
            cast(node, new)
            changed = True
    if changed:
        body.recompile()


def _rewrite_kernel(body: GraphModule, call: Node, old: torch.dtype, new: torch.dtype) -> bool:
    """A kernel for the new dtype, or, where kernels take no such activations, the operators it stands for."""
    inputs, text = call.args
    assert isinstance(inputs, list | tuple)
    spec = parsed(str(text))
    if spec.dtype != old:
        return False
    lane = type_name(new)
    value = next((node.meta["val"] for node in call.all_input_nodes if "val" in node.meta), None)
    on_gpu = isinstance(value, torch.Tensor) and value.device.type != "cpu"
    gpus_only = on_gpu or runs_on_kernels(spec.weight.layout)
    if lane is None or (lane not in LANE_TYPES and gpus_only):
        expanded(body.graph, call, new)
    else:
        call.args = (inputs, str(replace(spec, x=lane)))
    return True
