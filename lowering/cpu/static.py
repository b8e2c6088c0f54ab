"""Convolutions, and products of rows, whose activations have static scales, on the CPU's kernels.

In: a folded region around a convolution or a linear, both operands behind a `dequantize`. Out: the region
on the operator `bitfold.conv`, its weight in panels.

    %x = dequantize([%c, %s], "int8[tensor]", 56, f32)
    %w = reshape(dequantize([%wc, %ws], "int8", 288, f32), ..);  %y = conv2d(%x, %w, %b, [1, 1], [1, 1])
    ->  %y = bitfold.conv([%c, %s, %wc, %ws, %b],
                          "conv 64x32x3x3 p1x1 int8[panels16x4t9] x:int8[tensor] bias")[0]
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...codegen import CodegenError
from ...codegen.conv import ConvSpec, obstacle, panels
from ...formats import Layout
from ...formats import format as parse
from ...passes import Miss, inherit
from ...passes.edit import arguments
from ..inductor import dequantized
from .conv import parsed

aten = torch.ops.aten
CONV = torch.ops.bitfold.conv.default
TARGETS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.linear.default,
)


def layout_of(reader: Node) -> Layout | None:
    """How the weight that `reader` decodes shall lie, if a kernel of this kind will read it."""
    for user in reader.users:
        weight = user if user.target is aten.reshape.default else reader
        for anchor in [user, *user.users]:
            if anchor.target in TARGETS and anchor.args[1] is weight:
                spec = spec_of(anchor)
                return spec.layout if isinstance(spec, ConvSpec) else None
    return None


def lowered(anchor: Node) -> Node | None:
    """The anchor as a kernel, where there is one for it."""
    found = _operands(anchor)
    spec = spec_of(anchor)
    if found is None or not isinstance(spec, ConvSpec):
        return None
    x, weight = found
    if str(weight.args[1]) != str(spec.weight):
        return None  # laid out for another reader
    bias = anchor.args[2] if spec.bias else None
    inputs: list[Any] = [*x.args[0], *weight.args[0], *([] if bias is None else [bias])]  # type: ignore[misc]
    with anchor.graph.inserting_before(anchor):
        call = anchor.graph.call_function(CONV, (inputs, str(spec)))
        made = [call, anchor.graph.call_function(operator.getitem, (call, 0))]
        if spec.kernel:  # it has its channels innermost, which who reads a module's result does not expect
            made.append(anchor.graph.call_function(aten.contiguous.default, (made[-1],)))
    for new in made:
        new.meta["val"] = anchor.meta["val"]
        inherit(new, [anchor, weight])
    call.meta["val"] = [anchor.meta["val"]]
    return made[-1]


def spec_of(anchor: Node) -> ConvSpec | Miss:
    """What a kernel would compute in place of a convolution or a linear, its weight in panels."""
    found = _operands(anchor)
    if found is None:
        return Miss("its activations, or its weight, are no codes")
    x, weight = found
    of_x, of_weight = parse(str(x.args[1])), parse(str(weight.args[1]))
    if (why := obstacle(of_weight, of_x)) is not None:
        return Miss(why)
    if anchor.meta["val"].dtype != torch.float32:
        return Miss(f"kernels of convolutions give float32, not {anchor.meta['val'].dtype}")
    shape = [int(size) for size in anchor.args[1].meta["val"].shape]  # type: ignore[union-attr]
    bias = anchor.args[2] if len(anchor.args) > 2 else None
    if isinstance(bias, Node) and bias.meta["val"].dtype != torch.float32:
        return Miss("its bias is not float32")
    more = {} if anchor.target is aten.linear.default else _geometry(anchor, shape)
    if isinstance(more, Miss):
        return more
    n, k, *kernel = shape
    kernel = [1, *kernel] if len(kernel) == 1 else kernel
    taps = kernel[0] * kernel[1] if kernel else 1
    laid = of_weight.with_layout(panels(n, k, taps, int(more.get("groups", 1))))
    try:
        return ConvSpec(laid, of_x, n, k, tuple(kernel), bias=bias is not None, **more)
    except CodegenError as error:
        return Miss(str(error))


def _operands(anchor: Node) -> tuple[Node, Node] | None:
    """The `dequantize` of x and of the weight."""
    weight = anchor.args[1]
    if isinstance(weight, Node) and weight.target is aten.reshape.default:
        weight = weight.args[0]
    found = dequantized(anchor.args[0]), dequantized(weight)
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _geometry(anchor: Node, shape: Sequence[int]) -> dict[str, Any] | Miss:
    """Strides, padding, dilation and groups, for two dimensions."""
    x = anchor.args[0].meta["val"]  # type: ignore[union-attr]
    if x.ndim != len(shape):
        return Miss("its input has no batch")
    _, _, _, stride, padding, dilation, groups = arguments(anchor)
    rank = len(shape) - 2
    stride, dilation = _each(stride, rank), _each(dilation, rank)
    if padding == "valid":
        before = after = [0] * rank
    elif padding == "same":
        whole = [d * (size - 1) for d, size in zip(dilation, shape[2:], strict=True)]
        before = [total // 2 for total in whole]
        after = [total - total // 2 for total in whole]
    else:
        before = after = _each(padding, rank)
    if rank == 1:
        stride, dilation, before, after = [1, *stride], [1, *dilation], [0, *before], [0, *after]
    return {
        "stride": tuple(stride),
        "padding": (*before, *after),
        "dilation": tuple(dilation),
        "groups": int(groups),
    }


def _each(given: Sequence[int] | int, rank: int) -> list[int]:
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * rank if len(sizes) == 1 else sizes


def cast(call: Node, new: torch.dtype) -> None:
    """A kernel in a module that computes in `new` from now on: it still computes in float32, and its
    result, and its bias before, are brought from one to the other."""
    graph, spec = call.graph, parsed(str(call.args[1]))
    inputs = list(call.args[0])  # type: ignore[arg-type]
    at = spec.weight_at + len(spec.weight.parts)
    if spec.bias and inputs[at].target is not aten.to.dtype:
        with graph.inserting_before(call):
            inputs[at] = graph.call_function(aten.to.dtype, (inputs[at], torch.float32))
        call.args = (inputs, *call.args[1:])
    for result in list(call.users):
        for user in list(result.users):
            if user.target is aten.to.dtype:
                user.args = (result, new)
                return
        with graph.inserting_after(result):
            made = graph.call_function(aten.to.dtype, (result, new))
        for user in list(result.users):
            if user is not made:
                user.replace_input_with(result, made)


def know(gm: GraphModule) -> None:
    """All kernels of a graph, compiled side by side."""
    calls = gm.graph.find_nodes(op="call_function", target=CONV)
    if calls:
        from ...codegen.cpp.conv_build import know as compiled

        compiled(parsed(str(call.args[1])) for call in calls)
