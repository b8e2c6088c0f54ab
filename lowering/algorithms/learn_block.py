"""One block's rounding learned by descent on what the block gives.

In: a chain at a block, the float block's outputs, the block's sites with drafts. Out: drafts of better
values.

    learn_block(Learn(steps=200), chain, 0, targets, sites)

A step takes one calibration batch through the block on rounded weights, and moves the weights. Every tenth of
the steps all data are looked at, and the best weights kept, the first ones included: learning never makes it
worse on these data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...passes.algorithms.draft import DRAFT
from ...passes.algorithms.learn import Learn
from ..module_scope import Site
from .blocks import Chain, first_tensor
from .learnable import Learnt, as_read, called, roundings


def learn_block(
    step: Learn, chain: Chain, place: int, targets: Sequence[Tensor], sites: Sequence[Site]
) -> None:
    """Learn, and put the new drafts on the sites' anchors. Embeddings, convolutions and experts are left."""
    block = chain.blocks[place]
    learnt = roundings(sites, chain.paths[place])
    if not learnt:
        return
    least = _loss(block, chain, place, targets, learnt, first=True)
    draw = torch.Generator().manual_seed(0)
    for number in range(step.steps):
        left = 1 - number / step.steps
        slopes = _slopes(block, chain, place, targets, learnt, draw)
        for name, found in slopes.items():
            rounding = learnt[name][1]
            for moved, slope, rate in zip(rounding.movable(), found, (step.rate, step.scales), strict=False):
                moved -= left * rate * slope.sign()
            rounding.bound()
        if (number + 1) % max(step.steps // 10, 1) == 0 or number + 1 == step.steps:
            loss = _loss(block, chain, place, targets, learnt)
            if loss < least:
                least = loss
                for _, rounding in learnt.values():
                    rounding.keep()
    for node, rounding in learnt.values():
        node.meta[DRAFT] = rounding.draft()


def _slopes(
    block: nn.Module,
    chain: Chain,
    place: int,
    targets: Sequence[Tensor],
    learnt: Learnt,
    draw: torch.Generator,
) -> dict[str, list[Tensor]]:
    """Of the error on one of the batches, by what moves."""
    index = int(torch.randint(len(chain.hidden), (), generator=draw))
    leaves = {name: rounding.values().requires_grad_() for name, (_, rounding) in learnt.items()}
    with torch.enable_grad():
        args, kwargs = chain.arguments(place, index)
        result = first_tensor(called(block, as_read(leaves, learnt), args, kwargs))
        error = (result - targets[index]).float().square().mean()
        if not error.requires_grad:
            return {}
        # An expert that the batch sends no token to has no gradient, and stays.
        gradients = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
    return {
        name: learnt[name][1].slopes(gradient, value.detach())
        for (name, value), gradient in zip(leaves.items(), gradients, strict=True)
        if gradient is not None
    }


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
