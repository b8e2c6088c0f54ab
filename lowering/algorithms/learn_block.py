"""One block's rounding learned by descent on what the block gives.

In: a chain at a block, the float block's outputs, the block's sites with drafts. Out: drafts of better
values.

    work(Learn(steps=200), Block(whole, chain, 0, sites, swaps, targets))

A step takes one calibration batch through the block on rounded weights, and moves the weights. Every tenth of
the steps all data are looked at, and the best weights kept, the first ones included: learning never makes it
worse on these data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes.algorithms.draft import DRAFT
from ...passes.algorithms.learn import Learn
from .blocks import Chain, first_tensor
from .learnable import Descent, Learnt, as_read, called, falls_short, roundings
from .places import Block, work


@work.register
def learn_block(step: Learn, at: Block) -> None:
    """Learn, and put the new drafts on the sites' anchors. Embeddings, convolutions and experts are left."""
    block, chain, place, targets = at.module, at.chain, at.place, at.targets
    at.whole.found.misses += falls_short(step, at.sites)
    learnt = roundings(at.sites, at.path)
    if not learnt:
        return
    least = _loss(block, chain, place, targets, learnt, first=True)
    why = _no_gradient(block, chain, place, targets, learnt)
    if why and chain.largest:
        raise BitfoldError(f"learn has no gradient in {at.path}: {why}; leave learn out")
    if why:
        at.whole.miss(at.path, step.name, f"there is no gradient in it: {why}")
        return
    draw = torch.Generator().manual_seed(0)
    descent = Descent(learnt, (step.rate, step.scales))
    for number in range(step.steps):
        if at.whole.progress is not None:
            at.whole.progress(f"{step.name} {at.path}, step {number}", number, step.steps)
        index = int(torch.randint(len(chain.hidden), (), generator=draw))
        values = {name: rounding.values().requires_grad_() for name, (_, rounding) in learnt.items()}
        gradients = _gradients(block, chain, place, index, targets[index], values, learnt)
        descent.step(1 - number / step.steps, gradients, values)
        if (number + 1) % max(step.steps // 10, 1) == 0 or number + 1 == step.steps:
            loss = _loss(block, chain, place, targets, learnt)
            if loss < least:
                least = loss
                for _, rounding in learnt.values():
                    rounding.keep()
    for node, rounding in learnt.values():
        node.meta[DRAFT] = rounding.draft()


def _no_gradient(
    block: nn.Module, chain: Chain, place: int, targets: Sequence[Tensor], learnt: Learnt
) -> str:
    """Why no batch has a gradient of any weight, so that there is nothing to learn from; "" if one has."""
    values = {name: rounding.values().requires_grad_() for name, (_, rounding) in learnt.items()}
    for index, target in enumerate(targets):
        if _gradients(block, chain, place, index, target, values, learnt):
            return ""
    return "its forward computes under torch.no_grad(), or none of its weights reaches its result"


def _gradients(
    block: nn.Module,
    chain: Chain,
    place: int,
    index: int,
    target: Tensor,
    values: dict[str, Tensor],
    learnt: Learnt,
) -> dict[str, Tensor | None]:
    """Of the error on a batch, by the rounded weights; None for one that the batch does not reach."""
    with torch.enable_grad():
        args, kwargs = chain.arguments(place, index)
        result = first_tensor(called(block, as_read(values, learnt), args, kwargs))
        error = (result - target).float().square().mean()
        if not error.requires_grad:
            return {}
        gradients = torch.autograd.grad(error, list(values.values()), allow_unused=True)
    return dict(zip(values, gradients, strict=True))


def _loss(
    block: nn.Module,
    chain: Chain,
    place: int,
    targets: Sequence[Tensor],
    learnt: Learnt,
    *,
    first: bool = False,
) -> float:
    """The squared error over all data, of what was given (`first`) or is now."""
    values = {
        name: rounding.best.rounded(rounding.format) if first else rounding.values()
        for name, (_, rounding) in learnt.items()
    }
    weights = as_read(values, learnt)
    total = 0.0
    for index, target in enumerate(targets):
        args, kwargs = chain.arguments(place, index)
        result = first_tensor(called(block, weights, args, kwargs))
        total += float((result - target).float().square().sum())
    return total
