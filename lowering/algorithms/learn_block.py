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
from torch.func import functional_call
from torch.fx import Node

from ...formats import format
from ...passes import expression
from ...passes.algorithms.draft import DRAFT, Draft
from ...passes.algorithms.learn import Learn, Rounding
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ..module_scope import Site
from ..turned import turned
from .blocks import Chain, first_tensor


def learn_block(
    step: Learn, chain: Chain, place: int, targets: Sequence[Tensor], sites: Sequence[Site]
) -> None:
    """Learn, and put the new drafts on the sites' anchors. Embeddings, convolutions and experts are left."""
    block, path = chain.blocks[place], chain.paths[place]
    found: dict[str, tuple[Node, Rounding]] = {}
    for site in sites:
        for node, note in annotated(site.gm):
            operand = node.args[TARGETS[node.target][2]]
            held = expression(site.gm, operand) if isinstance(operand, Node) else None
            draft = node.meta.get(DRAFT)
            if held is None or held.text or note.anchor != "linear" or not isinstance(draft, Draft):
                continue
            assert note.weight is not None
            name = held.path.removeprefix(path).strip(".")
            found[name] = node, Rounding(format(note.weight), draft, turned(node))
    if not found:
        return
    roundings = {name: rounding for name, (_, rounding) in found.items()}
    least = _loss(block, chain, place, targets, roundings)
    draw = torch.Generator().manual_seed(0)
    for number in range(step.steps):
        rate = step.rate * (1 - number / step.steps)
        gradients = _gradients(block, chain, place, targets, roundings, draw)
        for name, gradient in gradients.items():
            roundings[name].move(gradient, rate)
        if (number + 1) % max(step.steps // 10, 1) == 0 or number + 1 == step.steps:
            loss = _loss(block, chain, place, targets, roundings)
            if loss < least:
                least = loss
                for rounding in roundings.values():
                    rounding.best = rounding.place
    for node, rounding in found.values():
        node.meta[DRAFT] = rounding.draft()


def _gradients(
    block: nn.Module,
    chain: Chain,
    place: int,
    targets: Sequence[Tensor],
    roundings: dict[str, Rounding],
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """Of the error on one of the batches, by the weights that this batch reaches."""
    index = int(torch.randint(len(chain.hidden), (), generator=draw))
    with torch.enable_grad():
        leaves = {name: rounding.values() for name, rounding in roundings.items()}
        args, kwargs = chain.arguments(place, index)
        result = _call(block, _as_read(leaves, roundings), args, kwargs)
        error = (result - targets[index]).float().square().mean()
        if not error.requires_grad:
            return {}
        found = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
        return {name: one for name, one in zip(leaves, found, strict=True) if one is not None}


def _loss(
    block: nn.Module, chain: Chain, place: int, targets: Sequence[Tensor], roundings: dict[str, Rounding]
) -> float:
    """The mean squared error over all data."""
    with torch.no_grad():
        weights = _as_read({name: rounding.values() for name, rounding in roundings.items()}, roundings)
        total = 0.0
        for index, target in enumerate(targets):
            args, kwargs = chain.arguments(place, index)
            total += float((_call(block, weights, args, kwargs) - target).float().square().sum())
    return total


def _as_read(values: dict[str, Tensor], roundings: dict[str, Rounding]) -> dict[str, Tensor]:
    """The weights for modules that run no transform of their inputs yet."""
    return {
        name: torch.ops.bitfold.hadamard(value, True) if roundings[name].turned else value
        for name, value in values.items()
    }


def _call(
    block: nn.Module, weights: dict[str, Tensor], args: tuple[object, ...], kwargs: dict[str, object]
) -> Tensor:
    """The block with these weights, in its own dtype."""
    held = {name: value.to(block.get_parameter(name).dtype) for name, value in weights.items()}
    return first_tensor(functional_call(block, held, args, kwargs))
