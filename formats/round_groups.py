"""Rounding and its gradients as operators of their own, which a device may have a kernel for.

In: x [..., K], stored scales (none: they are chosen from x), a format. Out: x rounded; or gradients.

    round_groups(x, [], "int4[g32]")                    ->   format("int4[g32]").fake_quantize(x)
    round_groups_backward(g, x, scales, held, ..)       ->   [for x, for each number held]

What stands here is the reference, which any device runs that has no kernel registered (`lowering/cuda`).
`train_quantize` calls it where its gradient says `+kernel`, and for `straight` where `has_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import ops
from .text import format

KERNELS: dict[str, Callable[[Tensor, str], bool]] = {}
"""By type of device: whether a kernel of it rounds numbers such as x to a format."""


def has_kernel(x: Tensor, text: str) -> bool:
    """Whether x's device has a kernel that rounds x to the format."""
    return x.device.type in KERNELS and KERNELS[x.device.type](x, text)


def round_groups(x: Tensor, scales: Sequence[Tensor], text: str) -> Tensor:
    """In x's shape and dtype, contiguous."""
    return format(text).fake_quantize(x.contiguous(), tuple(scales) or None)


def round_groups_backward(
    gradient: Tensor, x: Tensor, scales: Sequence[Tensor], held: Sequence[Tensor], text: str, kind: str
) -> list[Tensor]:
    """[for x, *for held], as `train_quantize.backward` has them."""
    from .gradient import Gradient
    from .train_quantize import backward

    how = Gradient.parse(kind)
    for_x, for_held = backward(format(text), how, gradient.contiguous(), x.contiguous(), tuple(scales), held)
    return [for_x, *(part for part in for_held if part is not None)]


def _shape(x: Tensor, scales: Sequence[Tensor], text: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _shapes(
    gradient: Tensor, x: Tensor, scales: Sequence[Tensor], held: Sequence[Tensor], text: str, kind: str
) -> list[Tensor]:
    from .gradient import Gradient

    learned = held if Gradient.parse(kind).learns else ()
    return [_shape(x, scales, text), *(torch.empty_like(part) for part in learned)]


SCHEMAS = {
    "round_groups": "(Tensor x, Tensor[] scales, str format) -> Tensor",
    "round_groups_backward": (
        "(Tensor gradient, Tensor x, Tensor[] scales, Tensor[] held, str format, str kind) -> Tensor[]"
    ),
}
for _function, _fake in ((round_groups, _shape), (round_groups_backward, _shapes)):
    _name = _function.__name__
    ops._library.define(_name + SCHEMAS[_name])
    ops._library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitfold::{_name}", _fake, lib=ops._library)
