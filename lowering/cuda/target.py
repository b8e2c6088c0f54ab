"""The CUDA target: products with codes become generated kernels, the rest of a region stays with Inductor.

In: a region around a matmul, its weight behind a `dequantize`. Out: the region on `bitfold.fused`, whose
weight is laid out for the kernels.

    %w = dequantize([%c, %s], "int4[g128,halves256]", 4096, bf16); %y = linear(%x, %w, %b)
    ->  %f = bitfold.fused([%x, %c, %s, %b], "linear 4096x4096 bf16 int4[g128,halves256] bias"); %y = %f[0]

    %w = dequantize(.., "int8[halves64]", ..); %y = _grouped_mm(%x, transpose(%w), %ends)
    ->  %f = bitfold.fused([%x, %ends, ..], "grouped 8 4096x4096 bf16 int8[halves64]"); %y = %f[0]

Activations that come quantized to int8 or float8_e4m3fn are multiplied as they are, by weights that such a
lane holds; pointwise operations around a kernel become part of it (`splice.py`).

What no kernel takes (float32 activations, a group of no multiple of 16, a convolution) keeps its dequantize:
Inductor puts the decoding into the loop of a matrix vector product, and in front of a larger matmul. One
warning says so.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...codegen import CodegenError, GemmSpec, choose, kernel_layout, runs_on_kernels
from ...codegen.decode import finite
from ...codegen.device import present
from ...codegen.lanes import LANE_TYPES
from ...codegen.schedule import OVERLAP_FROM
from ...codegen.spec import NATIVE, type_name
from ...formats import Format, Layout, Quantized, format
from ...passes import Miss, inherit
from ..fused import parsed
from ..inductor import InductorTarget, dequantized
from ..product import Product, product, products
from ..splice import splice
from ..target import Compiled
from .launches import can_overlap, every_kernel_waits

aten = torch.ops.aten
# Compute capability from which tensor cores multiply float8.
FLOAT8_FROM = 89


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

    def layout_for(self, reader: Node, format: Format, k: int) -> Layout:
        """In bytes where tensor cores multiply the activations' own codes."""
        for user in products(reader):
            codes = activation_codes(user)
            if codes is not None and (found := _in_bytes(user, codes, format, k)) is not None:
                return found
        return self.layout(format, k)

    def settings(self) -> dict[str, Any]:
        """Kernels of Inductor's between ours start before their predecessors have ended, too: a token of
        Llama-3-8B in int4 takes 8 % less (`docs/notes/gpu.md`)."""
        early = present().arch >= OVERLAP_FROM and can_overlap()
        return {"triton.enable_pdl": True} if early else {}

    def compile(self, gm: GraphModule, example_inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
        with every_kernel_waits() if can_overlap() else nullcontext():
            return super().compile(gm, example_inputs, config)

    def finish(self, gm: GraphModule) -> int:
        """Operations around kernels become part of them."""
        return splice(gm)

    def lower(self, region: GraphModule) -> GraphModule:
        for node in list(region.graph.nodes):
            found = product(node)
            spec = spec_of(found) if isinstance(found, Product) else found
            if isinstance(found, Product) and isinstance(spec, GemmSpec):
                node.replace_all_uses_with(_fused(found, spec))
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


def activation_codes(of: Product) -> Node | None:
    """The `dequantize` of a product's activations, if a kernel can multiply their codes."""
    given = dequantized(of.x)
    if given is None:
        return None
    fmt = format(str(given.args[1]))
    element = fmt.element
    if element not in NATIVE or fmt.layout.name != "bytes":
        return None
    # The tensor cores of GPUs before 8.9 have no float8: such activations are decoded.
    return None if NATIVE[element] == "e4m3" and present().arch < FLOAT8_FROM else given


def _in_bytes(of: Product, codes: Node, weight: Format, k: int) -> Layout | None:
    """The layout of a weight for such a product; None if there is no kernel of it."""
    activation = format(str(codes.args[1]))
    laid_out = kernel_layout(weight, k, activation)
    if laid_out is None:
        return None
    return None if isinstance(_spec(of, laid_out, k, activation), Miss) else laid_out.layout


def spec_of(of: Product) -> GemmSpec | Miss:
    """What a kernel would compute for this product, or why there is none."""
    fmt, k = format(str(of.weight.args[1])), int(str(of.weight.args[2]))
    codes = activation_codes(of)
    if codes is not None and not runs_on_kernels(fmt.layout):
        activation = format(str(codes.args[1]))
        if kernel_layout(fmt, k, activation) == fmt:
            return _spec(of, fmt, k, activation)
    if not runs_on_kernels(fmt.layout):
        return Miss(f"no kernel walks over {fmt}")
    return _spec(of, fmt, k, None)


def _spec(of: Product, weight: Format, k: int, activation: Format | None) -> GemmSpec | Miss:
    dtype = of.x.meta["val"].dtype
    lane = type_name(dtype)
    if lane not in LANE_TYPES:
        return Miss(f"the activations are {dtype}, and kernels take bfloat16 or float16")
    if of.bias is not None and of.bias.meta["val"].dtype != dtype:
        return Miss("the bias has another dtype than the activations")
    try:
        spec = GemmSpec(weight, of.n, k, lane, of.bias is not None, activation, experts=of.experts)
    except CodegenError as error:
        return Miss(str(error))
    # The very value that calls will look up, so that they compare no two.
    spec = parsed(str(spec))
    return spec if choose(spec, 1) is not None else Miss(f"no schedule runs {spec}")


def _fused(of: Product, spec: GemmSpec) -> Node:
    node, graph = of.node, of.node.graph
    value: Tensor = node.meta["val"]
    parts: Any = of.weight.args[0]
    x: Any = [of.x]
    if spec.activation is not None:
        codes = activation_codes(of)
        assert codes is not None
        x = codes.args[0]
    inputs = [*x, of.ends, *parts, of.bias]
    with graph.inserting_before(node):
        call = graph.call_function(
            torch.ops.bitfold.fused.default, ([one for one in inputs if one is not None], str(spec))
        )
        call.meta["val"] = [value]
        new = graph.call_function(operator.getitem, (call, 0))
        new.meta["val"] = value
    for made in (call, new):
        inherit(made, [node, of.weight])
    return new
