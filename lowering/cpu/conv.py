"""The operator that a convolution in codes becomes on a CPU: its text regenerates the kernel anywhere.

In: a kernel's inputs and the text of its `ConvSpec` (see `codegen/conv.py`). Out: its results. Registered by
`_operators.py`.

    bitfold.conv([codes, scale, weight codes, weight scales, bias, scale of y], "conv 64x32x3x3 p1x1 ..")
    ->   [y]

Whatever lies otherwise is brought to channels innermost by the operator itself; results lie so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...codegen import CodegenError
from ...codegen.conv import ConvSpec
from ...formats import Format, FormatError, cache_tag
from ...formats.ops import no_gradient_text


@lru_cache(maxsize=4096)
def parsed(text: str) -> ConvSpec:
    """The spec that a text says; CodegenError if it says none."""
    return ConvSpec.parse(text)


def weights_of(node: Node) -> list[tuple[list[object], str, int]]:
    """(parts, format, K) of the weight that a call of the operator reads."""
    inputs, text = node.args
    assert isinstance(inputs, list | tuple) and isinstance(text, str)
    spec = parsed(text)
    return [
        (
            list(inputs[spec.weight_at : spec.weight_at + len(spec.weight.parts)]),
            str(spec.weight),
            spec.products,
        )
    ]


def fake(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """Shapes and strides only."""
    spec = parsed(text)
    x = inputs[0]
    return [_empty(spec, x, torch.float32 if f is None else torch.uint8) for f in spec.writes]


def _empty(spec: ConvSpec, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not spec.kernel:
        return x.new_empty(*x.shape[:-1], spec.n, dtype=dtype)
    if x.ndim == 3 and not spec.of_a_line:
        raise CodegenError(f"{spec} is of two dimensions, and takes x [images, channels, height, width]")
    height, width = spec.size(1 if x.ndim == 3 else x.shape[2], x.shape[-1])
    places = (width,) if x.ndim == 3 else (height, width)
    return x.new_empty(x.shape[0], *places, spec.n, dtype=dtype).movedim(-1, 1)


def reference(inputs: Sequence[Tensor], text: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same in torch: decoded, convolved and finished in `dtype`, and the results made codes."""
    spec = parsed(text)
    given = spec.inputs(inputs)
    x = decoded(spec.activation, given.x, dtype)
    codes, scales = given.parts
    # Not by `dequantize`, which multiplies in float32 whatever the dtype.
    rows = spec.weight.unpack(codes, spec.products).view(torch.int8).to(dtype) * scales.to(dtype)
    bias = None if given.bias is None else given.bias.to(dtype)
    if spec.kernel:
        y = _convolved(spec, x, rows.reshape(spec.n, spec.k, *spec.kernel), bias)
    else:
        y = torch.nn.functional.linear(x, rows, bias)
    named = {"y0": y}
    for i, (f, extra) in enumerate(zip(spec.reads, given.extras, strict=True)):
        named[f"e{i}"] = extra[0].to(dtype) if f is None else decoded(f, extra, dtype)
    shape = (-1, *(1,) * (y.ndim - 2)) if spec.kernel else (-1,)
    named |= {f"v{i}": vector.to(dtype).reshape(shape) for i, vector in enumerate(given.vectors)}
    result = spec.epilogue.run(named, dtype)
    steps = iter(given.scales)
    return [result if f is None else f.quantize(result, list(next(steps))).codes for f in spec.writes]


def decoded(f: Format, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Codes with one scale a tensor as numbers."""
    codes, scale, *zero = parts
    above = codes.view(torch.int8).to(dtype)
    above = above - zero[0].to(dtype).reshape(()) if zero else above
    return above * scale.to(dtype).reshape(())


def _convolved(spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    line = x.ndim == 3
    top, left, bottom, right = spec.padding
    padded = torch.nn.functional.pad(x.unsqueeze(2) if line else x, (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, weight, bias, spec.stride, 0, spec.dilation, spec.groups)
    return y.squeeze(2) if line else y


def build_for_cpu(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """The first call on CPU tensors of a process: builds the operator in C++, which takes its own place."""
    spec = parsed(text)
    device = inputs[0].device.type if inputs else "no device"
    if device != "cpu":
        raise CodegenError(f"bitfold.conv runs on CPUs, not on {device}")
    from ...codegen.cpp.conv_build import know

    know([spec])
    found: list[Tensor] = torch.ops.bitfold.conv(list(inputs), text)
    return found


def keep(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
    """What the error says."""
    ctx.text = inputs[1]


def backward(ctx: Any, *grads: Any) -> Any:
    """No gradient goes through codes."""
    raise FormatError(no_gradient_text(str(parsed(ctx.text).activation)))


# Torch's compile caches know the operator by name only.
cache_tag.add("conv 1")
