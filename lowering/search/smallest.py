"""The smallest recipe that, run as a whole, loses no more than a share of the perplexity.

In: a model, data, a `Sensitivity`, a share. Out: a recipe whose own loss was measured and holds.

    finest everywhere                 8.5 bits    0.1 %       does it hold at all?
    as the losses add up              5.1         1.3 %       too much
    as they scale to what was seen    5.6         0.8 %       holds
    halfway between, in bits          5.3         1.0 %       ... until the two are a hundredth of a bit apart

Losses by layer are estimates: a table may be off by any factor, and only its order is taken from it. What is
run are recipes of the front (the least sum of losses for their size), and of equal ones the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...formats import BitfoldError
from ...passes.algorithms.draft import DRAFT
from ...passes.core import Progress
from ...passes.note import annotated
from ...passes.recipes import Recipe
from ..algorithms.at_rest import at_rest
from ..algorithms.calibration import Batches
from ..module_scope import plan
from ..outputs import first_output
from ..swaps import Swaps
from .integer_program import bits_of, fewest_bits, fewest_losses, finest
from .layers import round_site
from .sensitivity import Choice, Loss, Sensitivity, lost, percent

_RUNS = 12
_SCALED = 3  # runs whose size the losses say; after them sizes are halved
_APART = 0.01  # bits a weight


def smallest(
    model: nn.Module,
    data: Sequence[Any],
    table: Sensitivity,
    share: float,
    name: str,
    loss: Loss,
    progress: Progress | None = None,
) -> Recipe:
    """The recipe, which says in `about` what it loses and where the search ended. Runs the float model and a
    rounded one on all of `data` up to twelve times. Raises BitfoldError if the finest recipe loses more."""
    runs = _Runs(model, data, table, name, loss, progress)
    most, held = math.log1p(share), finest(table)
    if not math.isfinite(runs.loss(held)):
        raise BitfoldError("with the finest format for each layer the model's loss is not finite")
    if runs.loss(held) > most:
        raise BitfoldError(
            f"the finest formats for each layer lose {percent(runs.loss(held))} together, more than "
            f"{percent(most)}; add finer ones"
        )
    ends = [sum(pick(c.loss for c in table.of(layer)) for layer in table.numel) for pick in (min, max)]
    least = bits_of(table, (min(table.of(layer), key=lambda one: one.bits) for layer in table.numel))
    low, high, bound = least - _APART / 2, bits_of(table, held), most
    while high - low > _APART and len(runs.seen) < _RUNS:
        chosen = fewest_bits(table, min(max(bound, ends[0]), ends[1]))
        size = bits_of(table, chosen)
        if len(runs.seen) > _SCALED or not low < size < high:
            size = (low + high) / 2
            chosen = _smallest_of_front(table, max(size, least))
        seen = runs.loss(chosen)
        if seen <= most:
            held, high = chosen, bits_of(table, chosen)
        else:
            low = size
        if math.isfinite(seen):
            bound = most * sum(choice.loss for choice in chosen) / max(seen, 1e-30)
    return table.recipe(held, name, runs.about(held, high - low))


def _smallest_of_front(table: Sensitivity, bits: float) -> list[Choice]:
    """The least sum of losses within so many bits a weight, in as few of them as do."""
    best = sum(choice.loss for choice in fewest_losses(table, bits + 1e-9))
    return fewest_bits(table, best + 1e-9 * abs(best))


@dataclass
class _Runs:
    """Recipes run as a whole, each once; `seen`: what they lost, by their formats."""

    model: nn.Module
    data: Sequence[Any]
    table: Sensitivity
    name: str
    apart: Loss
    progress: Progress | None
    seen: dict[tuple[str, ...], float] = field(default_factory=dict)

    def loss(self, chosen: Sequence[Choice]) -> float:
        """In nats."""
        key = _formats(chosen)
        if key not in self.seen:
            if self.progress is not None:
                size = bits_of(self.table, chosen)
                self.progress(f"run a recipe of {size:.2f} bits", len(self.seen), _RUNS)
            recipe = self.table.recipe(chosen, self.name)
            self.seen[key] = rounded_loss(self.model, recipe, self.data, self.apart)
        return self.seen[key]

    def about(self, held: Sequence[Choice], apart: float) -> str:
        """Behind the bits and losses of the recipe that was found."""
        found = f"; {percent(self.loss(held))} of perplexity, run as a whole"
        others = len(self.seen) - 1
        if others and _formats(held) == _formats(finest(self.table)):
            said = "smaller recipe" if others == 1 else "smaller recipes"
            return f"{found}; the finest format of each layer: {others} {said} lost more"
        return found + ("" if apart <= _APART else f"; ended after {_RUNS} recipes, {apart:.2f} bits apart")


def _formats(chosen: Sequence[Choice]) -> tuple[str, ...]:
    return tuple(choice.format for choice in sorted(chosen, key=lambda one: one.layer))


def rounded_loss(model: nn.Module, recipe: Recipe, data: Sequence[Any], loss: Loss) -> float:
    """The loss of the whole recipe, weights rounded to the nearest: the mean over batches, two outputs of one
    of which are held at a time."""
    total, count = 0.0, 0
    with at_rest(model), Swaps() as swaps:
        for site in plan(model, recipe, stored={}).sites:
            round_site(site)
            swaps.put(site)
            for node, _ in annotated(site.gm):
                node.meta.pop(DRAFT, None)
        for batch in Batches(data, None):
            with swaps.lifted():
                exact = first_output(model, batch)
            total += lost(loss, exact, first_output(model, batch))
            count += 1
            del exact  # before the next one is made
    return total / count
