"""The CUDA target: linears on codes become generated kernels, the rest of a region stays with Inductor.

In: a region around a matmul, its weight behind a `dequantize`. Out: the region on `bitfold.fused`, whose
weight is laid out for the kernels.

    %w = dequantize([%c, %s], "int4[g128,halves256]", 4096, bf16); %y = linear(%x, %w, %b)
    ->  %f = bitfold.fused([%x, %c, %s, %b], "linear 4096x4096 bf16 int4[g128,halves256] bias"); %y = %f[0]

What no kernel takes (float32 activations, a group of no multiple of 16, a convolution) keeps its dequantize:
Inductor puts the decoding into the loop of a matrix vector product, and in front of a larger matmul. One
warning says so.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..codegen import CodegenError, GemmSpec, choose, kernel_layout, runs_on_kernels
from ..codegen.decode import finite
from ..codegen.lanes import LANE_TYPES
from ..formats import Format, Layout, Quantized, format
from ..passes import Miss, inherit
from .inductor import InductorTarget, dequantized

aten = torch.ops.aten


class CudaTarget(InductorTarget):
    """One CUDA device."""

    name: ClassVar[str] = "cuda"
    device: ClassVar[str] = "cuda"

    def layout(self, format: Format, k: int) -> Layout:
        found = kernel_layout(format, k)
        return format.layout if found is None else found.layout

    def takes(self, codes: Quantized) -> bool:
        """Kernels decode by arithmetic that knows no infinities and no NaN, so a weight must hold none."""
        element = codes.format.element
        if finite(element):
            return True
        return bool(element.decode(codes.format.unpack(codes.codes, codes.k)).isfinite().all())

    def lower(self, region: GraphModule) -> GraphModule:
        for node in list(region.graph.nodes):
            if node.target is not aten.linear.default:
                continue
            weight = dequantized(node.args[1])
            spec = None if weight is None else spec_of(node, weight)
            if weight is not None and isinstance(spec, GemmSpec):
                node.replace_all_uses_with(_fused(node, weight, spec))
                region.graph.erase_node(node)
            elif isinstance(spec, Miss):
                # Python shows a warning once for each text, and the text names no layer.
                warnings.warn(
                    f"{spec.reason}, so such linears run on the slower code that Inductor makes",
                    stacklevel=2,
                )
        region.graph.eliminate_dead_code()
        region.recompile()
        return region


def spec_of(node: Node, weight: Node) -> GemmSpec | Miss:
    """What a kernel would compute for this linear, or why there is none."""
    text, k = weight.args[1], weight.args[2]
    x: Any = node.args[0]
    lane = next((name for name, dtype in LANE_TYPES.items() if dtype == x.meta["val"].dtype), None)
    if lane is None:
        return Miss(f"the activations are {x.meta['val'].dtype}, and kernels take bfloat16 or float16")
    fmt = format(str(text))
    if not runs_on_kernels(fmt.layout):
        return Miss(f"no kernel walks over {fmt}")
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, Node) and bias.meta["val"].dtype != x.meta["val"].dtype:
        return Miss("the bias has another dtype than the activations")
    try:
        spec = GemmSpec(fmt, int(weight.meta["val"].shape[0]), int(str(k)), lane, bias is not None)
    except CodegenError as error:
        return Miss(str(error))
    return spec if choose(spec, 1) is not None else Miss(f"no schedule runs {spec}")


def _fused(node: Node, weight: Node, spec: GemmSpec) -> Node:
    graph = node.graph
    bias = [node.args[2]] if spec.bias else []
    value: Tensor = node.meta["val"]
    parts: Any = weight.args[0]
    with graph.inserting_before(node):
        call = graph.call_function(
            torch.ops.bitfold.fused.default, ([node.args[0], *parts, *bias], str(spec))
        )
        call.meta["val"] = [value]
        new = graph.call_function(operator.getitem, (call, 0))
        new.meta["val"] = value
    for made in (call, new):
        inherit(made, [node, weight])
    return new
