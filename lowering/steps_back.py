"""The way from decoded rows back to the parameter that they came from.

In: how a weight's operand follows from its parameter (views, permutes, a reshape to rows). Out: the steps
that undo it, as data, so that `module.weight` is what it was in shape and meaning.

    transpose(weight [K, N], 0, 1) -> rows [N, K]      back: permute (1, 0)
    reshape(weight [O, I, 3, 3]) -> rows [O, I*9]      back: reshape (O, I, 3, 3)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..passes import Expression
from ..passes.anchors import BATCHED
from .folded_weight import Steps

aten = torch.ops.aten

_RESHAPES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
        *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    }
)
_SAME = frozenset({aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default})
_PERMUTES = frozenset(
    {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default}
)


def back_from(expression: Expression, kind: str) -> Steps | None:
    """Steps from an anchor's decoded rows to the parameter; None if a part of it was left out."""
    value: Tensor = torch.empty_like(expression.parameter, device="meta")
    back: list[tuple[str, tuple[int, ...]]] = []
    for target, rest, kwargs in expression.steps:
        before, value = value, target(value, *rest, **kwargs)
        if target in _RESHAPES:
            back.append(("reshape", tuple(before.shape)))
        elif target in _PERMUTES:
            back.append(("permute", _unpermuted(target, rest, before.ndim)))
        elif target not in _SAME and value.shape != before.shape:
            return None
    if kind.startswith("conv"):
        back.append(("reshape", tuple(value.shape)))
    if kind in BATCHED:
        back.append(("permute", _unpermuted(aten.transpose.int, (-2, -1), value.ndim)))
    return tuple(reversed(back))


def _unpermuted(target: object, rest: tuple[object, ...], ndim: int) -> tuple[int, ...]:
    """The permutation that undoes this one."""
    marked = torch.empty([2 + i for i in range(ndim)], device="meta")
    moved = target(marked, *rest)  # type: ignore[operator]
    order = [size - 2 for size in moved.shape]
    return tuple(order.index(dim) for dim in range(ndim))
