"""The rounding that trains, as an operator: the values of `fake_quantize`, and a chosen gradient.

In: x [..., K], a format, a gradient, and what the scales come from. Out: x rounded, in x's dtype.

    train_quantize(w, "int4[g128]", "straight", [])              scales from w itself, as `quantize` chooses
    train_quantize(x, "int8[tensor]", "clip", [low, high])       static scales of a range
    train_quantize(w, "int2[g32]", "lsq", [step])                learned scales (`learned.py`)
    train_quantize(x, "uint4[tensor]", "pact", [end])            learned end of the range

The values are those of `quantize` and `dequantize` with `params(...)`, bit for bit. `training` turns
stochastic rounding on, and gives x itself while `clock` (a step counter) is below `warmup`. `observe_range`
widens a range by what went through. As the formats' other operators these are plain torch below that looks at
no data, so that they trace and compile in both directions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

from . import learned, ops
from .cells import dithered
from .errors import FormatError
from .estimators import Back
from .format import Format
from .gradient import Gradient
from .granularity import Granularity
from .round_groups import has_kernel
from .text import format


def params(fmt: Format, gradient: Gradient, held: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Stored scales from what is held; None if they are chosen from the data in each call."""
    if not held:
        return None
    if gradient.learns:
        return gradient.estimator.scales(fmt, held)
    return fmt.from_range(held[0], held[1])


def train_quantize(
    x: Tensor,
    text: str,
    gradient: str,
    held: Sequence[Tensor],
    training: bool = False,
    clock: Tensor | None = None,
    warmup: int = 0,
) -> Tensor:
    """See the file; contiguous. A range [low, high] that has seen nothing (low > high) is that of x."""
    fmt, how = format(text), Gradient.parse(gradient)
    noisy = training and how.stochastic
    x = x.contiguous()  # as codes are: a matmul adds in another order for other strides
    straight = how.estimator.identity
    if straight and not (noisy or how.fused) and has_kernel(x, str(fmt)):
        how = replace(how, kernel=True)
    alone = how.kernel and straight and not noisy
    with torch.no_grad():
        scales = params(fmt, how, _seen(x, held, how))
        if scales is None:
            scales = () if alone else fmt.choose(x)  # a kernel finds them in the same pass
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *held))
    # What is random would be something else the second time.
    with contextlib.nullcontext() if noisy or how.keep else recomputed():
        if not tracked:
            value = _rounded(fmt, how, x, scales, noisy)
        elif torch._C._are_functorch_transforms_active():
            value = _straight(x, fmt, how, scales, noisy)
        else:
            value = _Rounding.apply(x, fmt, how, noisy, scales, *held)  # type: ignore[no-untyped-call]
        if clock is None or not training or warmup <= 0:
            return value
        return torch.where(clock >= warmup, value, x)


def _straight(x: Tensor, fmt: Format, how: Gradient, scales: tuple[Tensor, ...], noisy: bool) -> Tensor:
    """Under torch.func, which takes no autograd function within an operator: x - x.detach() is 0 with
    gradient 1, so the value stays as it is."""
    if not how.estimator.identity:
        raise FormatError(
            f"torch.func differentiates the gradient 'straight' only, not {str(how)!r}; take loss.backward()"
        )
    with torch.no_grad():
        value = _rounded(fmt, how, x, scales, noisy)
    return value + (x - x.detach())


def _seen(x: Tensor, held: Sequence[Tensor], how: Gradient) -> Sequence[Tensor]:
    if len(held) != 2 or how.learns:
        return held
    low, high = held
    empty = low > high
    # An empty x has no extremes, and no value that could show.
    ends = torch.aminmax(x.detach().to(torch.float32)) if x.numel() else (low.sum() * 0, high.sum() * 0)
    return torch.where(empty, ends[0], low), torch.where(empty, ends[1], high)


def _rounded(fmt: Format, how: Gradient, x: Tensor, scales: tuple[Tensor, ...], noisy: bool) -> Tensor:
    if how.kernel and not noisy:
        found: Tensor = torch.ops.bitfold.round_groups(x, list(scales), str(fmt))
        return found
    if noisy:
        return fmt.fake_quantize(dithered(fmt, x, scales), scales or None).to(x.dtype)
    return fmt.fake_quantize(x, scales or None)


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """In a graph that AOTAutograd traces: what is computed here is computed again in backward, not kept. What
    it takes (a weight, and its scales, few beside it) is there anyway, and rounded copies of all weights
    would be as large as they are. torch's own partition keeps what a matmul of the backward pass reads."""
    meta = traceback.get_current_meta()
    before = {key: meta[key] for key in _TAGS if key in meta}
    if not traceback.has_preserved_node_meta() or before:  # a checkpoint of the user's own decides
        yield
        return
    meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=0)
    try:
        yield
    finally:
        for key in _TAGS:
            meta.pop(key, None)


_TAGS = ("recompute", "ac_graph_id")


class _Rounding(torch.autograd.Function):
    """(x, learned numbers) -> x rounded; keeps x and the scales, and computes everything else again. What
    comes straight through keeps nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fmt: Format, how: Gradient, noisy: bool, scales: Any, *held: Tensor
    ) -> Tensor:
        ctx.about = (fmt, how, len(held))
        # Nothing is kept where the gradient goes straight through.
        ctx.save_for_backward(*(() if how.estimator.identity else (x, *scales, *held)))
        return _rounded(fmt, how, x, scales, noisy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        fmt, how, count = ctx.about
        if how.estimator.identity:
            return gradient, *(None,) * (4 + count)
        x, *rest = ctx.saved_tensors
        scales, held = tuple(rest[: len(rest) - count]), rest[len(rest) - count :]
        one = how.kernel and how.estimator.kernel(fmt, how.number) is not None
        if one and (held or not how.learns):
            for_x, *found = torch.ops.bitfold.round_groups_backward(
                gradient, x, list(scales), held, str(fmt), str(how)
            )
            return (for_x, None, None, None, None, *(found or [None] * len(held)))
        for_x, for_held = backward(fmt, how, gradient, x, scales, held)
        return (for_x, None, None, None, None, *for_held)


def backward(
    fmt: Format,
    how: Gradient,
    gradient: Tensor,
    x: Tensor,
    scales: tuple[Tensor, ...],
    held: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gradients of x and of what is held, from that of the rounded x."""
    estimator = how.estimator
    back = Back(fmt, x, scales, held, gradient, how.number, how.item)
    for_x = estimator.for_x(back)
    size = for_x.numel()
    if isinstance(size, int) and isinstance(x.numel(), int) and size != x.numel():
        raise FormatError(
            f"{estimator.name} gives a gradient of {list(for_x.shape)} for numbers in blocks of "
            f"{list(back.flow.shape)}; its for_x() is to give one for each"
        )
    for_x = for_x.reshape(x.shape).to(x.dtype)
    if not how.learns or not held:
        return for_x, (None,) * len(held)
    factor, grain = estimator.factor(back), learned.grain_of(fmt)
    parts = tuple(estimator.for_held(back))
    if len(parts) != len(held):
        raise FormatError(
            f"{estimator.name} learns {len(held)} tensor(s) of {fmt}, and its for_held() gives {len(parts)}"
        )
    sums = (_total(grain, part, like) for part, like in zip(parts, held, strict=True))
    return for_x, tuple(found if factor is None else found * factor for found in sums)


def _total(grain: Granularity, blocks: Tensor, like: Tensor) -> Tensor:
    """Sums over the numbers that share a scale, in the shape and dtype of what is learned."""
    if grain.rows is None:
        total = blocks.sum()
    elif grain.cols is None or grain.rows == 1:
        total = blocks.sum(-1)
    else:
        total = blocks.sum((1, 3))
    return total.reshape(like.shape).to(like.dtype)


def observe_range(x: Tensor, low: Tensor, high: Tensor, training: bool) -> None:
    """Widen [low, high] to hold x, in training; the same however often it sees the same x."""
    if not training or (isinstance(x.numel(), int) and x.numel() == 0):
        return
    with torch.no_grad():
        least, most = torch.aminmax(x.detach().to(torch.float32))
        low.copy_(torch.minimum(low, least))
        high.copy_(torch.maximum(high, most))


SCHEMAS = {
    "train_quantize": (
        "(Tensor x, str format, str gradient, Tensor[] held, bool training=False, Tensor? clock=None,"
        " int warmup=0) -> Tensor"
    ),
    "observe_range": "(Tensor x, Tensor(a!) low, Tensor(b!) high, bool training) -> ()",
}
for _function in (train_quantize, observe_range):
    ops._library.define(_function.__name__ + SCHEMAS[_function.__name__])
    ops._library.impl(_function.__name__, _function, "CompositeImplicitAutograd")
