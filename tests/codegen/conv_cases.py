"""Cases of convolution kernels: specs as text with no format, and their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold.codegen.conv import ConvSpec, has_zero, panels
from bitfold.formats import Format, format

STATIC = format("int8[tensor]")
SHIFTED = format("int8[tensor,zero]")


def spec_of(text: str) -> ConvSpec:
    """`64x32x3x3 p1x1 + bias -> relu(y0) y:int8[tensor]` with the formats put in; `+` for x without
    negatives, `zero` for x with a zero point."""
    head, arrow, tail = text.partition(" -> ")
    sizes, *words = head.split(" ")
    n, k, *kernel = map(int, sizes.split("x"))
    groups = next((int(word[1:]) for word in words if word[0] == "g"), 1)
    places = [word for word in words if word not in ("+", "bias", "tensor", "zero")]
    taps = kernel[0] * kernel[1] if kernel else 1
    weight = format("int8[tensor]" if "tensor" in words else "int8").with_layout(panels(n, k, taps, groups))
    made = [
        "conv",
        sizes,
        *places,
        str(weight),
        f"x:{'+' * ('+' in words)}{SHIFTED if 'zero' in words else STATIC}",
    ]
    made += ["bias"] * ("bias" in words)
    return ConvSpec.parse(" ".join(made) + arrow + tail)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(x: Tensor, least: int = -128, f: Format = STATIC, zero: int = 37) -> list[Tensor]:
    """Codes and the scale of x, and a zero point if the format has one; all 256 codes occur, or those from
    `least` on."""
    scale = (x.abs().amax() if x.numel() else torch.ones(())).clamp(min=1e-3) / 100
    codes = torch.round(x / scale).clamp(least, 127).to(torch.int8)
    if codes.numel() > 2:
        codes.view(-1)[0], codes.view(-1)[1] = least, 127
    return [codes.view(torch.uint8), scale.reshape(1), *origin(f, zero)]


def origin(f: Format, zero: int) -> list[Tensor]:
    """The zero point, where a format has one."""
    return [torch.tensor([zero], dtype=torch.int8)] * has_zero(f)


def operands(spec: ConvSpec, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Inputs of a call with x of this shape."""
    x = drawn(*shape, seed=seed)
    zeros = (-128, 37, 127, -5, 0)
    found = coded(x, 0 if spec.positive else -128, spec.activation, zeros[seed % 5])
    weight = drawn(spec.n, spec.products, seed=seed + 1) * (0.5 + torch.arange(spec.n) % 3)[:, None] * 0.1
    found += spec.weight.quantize(weight).parts
    found += [drawn(spec.n, seed=seed + 2)] if spec.bias else []
    y = torch.ops.bitfold.conv.default([t.to("meta") for t in [*found, *_rest(spec)]], str(spec))[0]
    for i, f in enumerate(spec.reads):
        extra = drawn(*y.shape, seed=seed + 10 + i)
        found += [extra] if f is None else coded(extra, f=f, zero=-77)
    found += [drawn(spec.n, seed=seed + 20 + i) for i in range(spec.epilogue.count("v"))]
    for i, f in enumerate(spec.writes):
        found += [] if f is None else [torch.tensor([0.03 + 0.01 * i]), *origin(f, zeros[(seed + i) % 5])]
    return found


def _rest(spec: ConvSpec) -> list[Tensor]:
    return [torch.empty(1)] * (spec.arity - spec.weight_at - 2 - spec.bias)
