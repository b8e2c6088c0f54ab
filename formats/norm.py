"""Batch norm folded into the rows before it, in the way that trains: two operators around a convolution.

In: a weight [O, K], what batch norm holds, and whether it normalizes by its batch. Out: the weight and the
bias that the folded convolution has, and what undoes them while batches still count.

    rows', bias', g = fold_norm(rows, bias, gamma, beta, mean, var, eps, training, clock, freeze)
    y = conv(x, rounded(rows'), bias');  z = unfold_norm(y, g, bias, gamma, beta, mean, var, .., training, ..)

    g = gamma / sqrt(var + eps) of the running statistics;  rows' = rows g;  bias' = (bias - mean) g + beta

So what is rounded is what will be folded (Jacob et al., 1712.05877, section 3.2). In training, before
`freeze`, bias' is 0 and z is the batch norm, by the batch's own statistics, of y / g + bias (Krishnamoorthi,
1806.08342, section 3.2.2); after it, and in evaluation, z is y. rows' and bias' are computed in float64 and
rounded once, as `passes/batch_norm.py` does it. Where gamma is 0 (the last norm of a residual block often
begins so), the batch's statistics and gamma's gradient are those of rows that gamma has not erased: g is then
1 / sqrt(var + eps) while batches count.

A batch norm that nothing folds freezes too: `freeze_norm` is batch norm before `freeze`, and after it, in
training as in evaluation, the map of the running statistics, which stand still.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import ops
from .errors import BitfoldError


def fold_norm(
    rows: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool = False,
    clock: Tensor | None = None,
    freeze: int = 0,
) -> list[Tensor]:
    """[rows', bias', g]; g is float64 [O]."""
    g = (1.0 if gamma is None else gamma.double()) / torch.sqrt(var.double() + eps)
    if training and gamma is not None:
        erased = gamma == 0 if clock is None else (gamma == 0) & (clock < freeze)
        g = torch.where(erased, torch.rsqrt(var.double() + eps), g)
    new = (rows.double() * g.reshape(-1, *(1,) * (rows.ndim - 1))).to(rows.dtype)
    shift = (0.0 if bias is None else bias.double()) - mean.double()
    shift = (shift * g + (0.0 if beta is None else beta.double())).to(rows.dtype)
    if not training:
        return [new, shift, g]
    if clock is None:
        return [new, torch.zeros_like(shift), g]
    return [new, torch.where(clock < freeze, torch.zeros_like(shift), shift), g]


def unfold_norm(
    y: Tensor,
    g: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
    training: bool = False,
    clock: Tensor | None = None,
    freeze: int = 0,
) -> Tensor:
    """z from y [B, O, ..]; moves mean and var as batch norm does, while it normalizes by the batch."""
    if not training:
        return y.clone()
    shape = (1, -1, *(1,) * (y.ndim - 2))
    # g is 0 only after `freeze`, where y itself is the result; the other branch must have no NaN as gradient.
    safe = torch.where(g == 0, 1.0, g).to(torch.float32).reshape(shape)
    raw = y.to(torch.float32) / safe
    raw = raw if bias is None else raw + bias.to(torch.float32).reshape(shape)
    dims = [0, *range(2, y.ndim)]
    count = y.numel() // y.shape[1]
    _refuse_one(count, clock, freeze)
    center = raw.mean(dims)
    spread = raw.var(dims, unbiased=False)
    z = (raw - center.reshape(shape)) * torch.rsqrt(spread + eps).reshape(shape)
    z = z if gamma is None else z * gamma.to(torch.float32).reshape(shape)
    z = (z if beta is None else z + beta.to(torch.float32).reshape(shape)).to(y.dtype)
    follows = None if clock is None else clock < freeze
    if _moves_nothing(count):
        return z if follows is None else torch.where(follows, z, y)
    with torch.no_grad():
        unbiased = spread.detach() * (count / max(count - 1, 1))
        for held, new in ((mean, center.detach()), (var, unbiased)):
            moved = held + momentum * (new.to(held.dtype) - held)
            held.copy_(moved if follows is None else torch.where(follows, moved, held))
    return z if follows is None else torch.where(follows, z, y)


def freeze_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
    training: bool,
    clock: Tensor,
    freeze: int,
    cudnn: bool,
) -> Tensor:
    """Batch norm of x [B, O, ..]; moves mean and var until the step `freeze`. `cudnn`: as for batch norm."""
    if not training:
        return torch.batch_norm(x, gamma, beta, mean, var, False, momentum, eps, cudnn)
    count = x.numel() // x.shape[1]
    _refuse_one(count, clock, freeze)
    if _moves_nothing(count):  # frozen, or traced, where torch's batch norm would refuse one value for good
        return torch.batch_norm(x, gamma, beta, mean.clone(), var.clone(), False, momentum, eps, cudnn)
    # Copies: what follows writes to the statistics, and the way back needs them as they were.
    still, moved = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    by_batch = torch.batch_norm(x, gamma, beta, *moved, True, momentum, eps, cudnn)
    by_running = torch.batch_norm(x, gamma, beta, *still, False, momentum, eps, cudnn)
    follows = clock < freeze
    with torch.no_grad():
        for held, new in zip((mean, var), moved, strict=True):
            held.copy_(torch.where(follows, new, held))
    return torch.where(follows, by_batch, by_running)


def _refuse_one(count: int, clock: Tensor | None, freeze: int) -> None:
    """Raises BitfoldError for one value a channel, where batch norm goes by its batch and the clock can be
    read. In a graph that is traced or captured it cannot; there the statistics stand still (below)."""
    if not isinstance(count, int) or count != 1:
        return
    if clock is not None and (not _readable(clock) or int(clock) >= freeze):
        return
    raise BitfoldError(
        "batch norm in training needs more than one value a channel to normalize by, and got one"
    )


def _readable(clock: Tensor) -> bool:
    if _get_current_dispatch_mode() is not None or is_functorch_wrapped_tensor(clock) or clock.is_meta:
        return False
    return not (clock.is_cuda and torch.cuda.is_current_stream_capturing())


def _moves_nothing(count: int) -> bool:
    """One value has no unbiased variance, and none has no mean: what is not a number would stay for good."""
    return isinstance(count, int) and count <= 1


SCHEMAS = {
    "fold_norm": (
        "(Tensor rows, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps,"
        " bool training=False, Tensor? clock=None, int freeze=0) -> Tensor[]"
    ),
    "unfold_norm": (
        "(Tensor y, Tensor g, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor(a!) mean, Tensor(b!) var,"
        " float momentum, float eps, bool training=False, Tensor? clock=None, int freeze=0) -> Tensor"
    ),
    "freeze_norm": (
        "(Tensor x, Tensor? gamma, Tensor? beta, Tensor(a!) mean, Tensor(b!) var, float momentum, float eps,"
        " bool training, Tensor clock, int freeze, bool cudnn) -> Tensor"
    ),
}
for _function in (fold_norm, unfold_norm, freeze_norm):
    ops._library.define(_function.__name__ + SCHEMAS[_function.__name__])
    ops._library.impl(_function.__name__, _function, "CompositeImplicitAutograd")


def _places(operator: torch._ops.OpOverload) -> Mapping[str, int]:
    """Where each argument of an operator stands, by its name."""
    return {argument.name: place for place, argument in enumerate(operator._schema.arguments)}


FOLD = _places(torch.ops.bitfold.fold_norm.default)
UNFOLD = _places(torch.ops.bitfold.unfold_norm.default)
FREEZE = _places(torch.ops.bitfold.freeze_norm.default)
