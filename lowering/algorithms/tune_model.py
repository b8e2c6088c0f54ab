"""Rounding, scales and vectors of a whole model learned from what the float model predicts.

In: a model, its sites with codes on their anchors, batches, new values of parameters so far. Out: better
codes on the anchors, and new values of the model's vectors (norms, biases).

    work(Tune(steps=200), at)    at.changes has "model.norm.weight" then, and anchors have other codes

The float model runs beside the rounded one on each batch, so that nothing of it is kept. An eighth of the
batches (one at least, if there are two) is never learned from: what does best there is kept, what was given
included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes.algorithms.draft import DRAFT
from ...passes.algorithms.tune import Tune
from ...passes.core import Progress
from ...passes.observing.batch import Batch
from ..outputs import divergence, first_output
from ..parameters import parameter_names
from ..swaps import Swaps
from .at_rest import at_rest
from .correct_biases import round_plainly
from .learnable import Descent, Learnt, as_read, called, falls_short, roundings
from .places import Whole, work

_ASIDE = 8


@work.register
def tune_model(step: Tune, at: Whole) -> None:
    """Learn; the model itself is as it was. Raises BitfoldError where the loss is no number."""
    model, found, batches = at.model, at.found, at.batches
    found.misses += falls_short(step, found.sites)
    for site in found.sites:
        round_plainly(site)  # where no solver has decided, that is what it starts from
    learnt = roundings(found.sites, "")
    with Swaps() as swaps, at_rest(model):
        for site in found.sites:
            swaps.put(site)  # what is not learned is rounded too, and so are inputs
        run = _Tuning(step, model, learnt, at.changes, swaps)
        every = min(_ASIDE, len(batches))
        aside = batches[::every]
        taught = [batch for place, batch in enumerate(batches) if place % every] or aside
        run.run(taught, aside, at.progress)
    for node, rounding in learnt.values():
        node.meta[DRAFT] = rounding.draft().quantized(rounding.format)
    at.changes |= run.best


class _Tuning:
    """What moves, and the two models on a batch."""

    def __init__(
        self, step: Tune, model: nn.Module, learnt: Learnt, changes: Mapping[str, Tensor], swaps: Swaps
    ) -> None:
        self.step, self.model, self.learnt, self.swaps = step, model, learnt, swaps
        self.changes = {path: value for path, value in changes.items() if path not in learnt}
        self.vectors = self._vectors() if step.vectors else {}
        self.best: dict[str, Tensor] = {}

    def _vectors(self) -> dict[str, tuple[Tensor, list[str]]]:
        """Parameters of one dimension, in float32, with all their names, by the first of these."""
        found = {}
        for names in parameter_names(self.model).values():
            held = self.changes.get(names[0], self.model.get_parameter(names[0]))
            if held.ndim == 1 and held.is_floating_point():
                found[names[0]] = held.detach().float().clone(), names
        return found

    def run(self, taught: Sequence[Batch], aside: Sequence[Batch], progress: Progress | None) -> None:
        more = [(value, self.step.vectors * float(value.abs().mean())) for value, _ in self.vectors.values()]
        descent = Descent(self.learnt, (self.step.rate, self.step.scales), more)
        self._check_gradients(taught)
        least = self._loss(aside, first=True)
        order: list[int] = []
        draw = torch.Generator().manual_seed(0)
        for number in range(self.step.steps):
            if progress is not None:
                progress(f"tune, step {number}", number, self.step.steps)
            order = order or torch.randperm(len(taught), generator=draw).tolist()
            values = {name: rounding.values().requires_grad_() for name, (_, rounding) in self.learnt.items()}
            gradients = self._gradients(taught[order.pop()], values)
            descent.step(1 - number / self.step.steps, gradients, values)
            if (number + 1) % max(self.step.steps // 10, 1) == 0 or number + 1 == self.step.steps:
                loss = self._loss(aside)
                if loss < least:
                    least = loss
                    self._keep()

    def _check_gradients(self, taught: Sequence[Batch]) -> None:
        """BitfoldError if no batch has a gradient: there is nothing to learn from."""
        values = {name: rounding.values().requires_grad_() for name, (_, rounding) in self.learnt.items()}
        if not any(self._gradients(batch, values) for batch in taught):
            raise BitfoldError(
                f"tune has no gradient in {type(self.model).__name__}: its forward computes under "
                "torch.no_grad(); leave tune out"
            )

    def _gradients(self, batch: Batch, values: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Of the loss on a batch, by rounded weights; those of vectors are left at them."""
        with self.swaps.lifted():
            exact = first_output(self.model, batch)
        vectors = {name: value.detach().requires_grad_() for name, (value, _) in self.vectors.items()}
        leaves = [*values.values(), *vectors.values()]
        with torch.enable_grad():
            loss = self._apart(exact, self._result(batch, values, vectors))
            if not loss.requires_grad:
                return {}
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        for (value, _), gradient in zip(self.vectors.values(), gradients[len(values) :], strict=True):
            value.grad = gradient
        return dict(zip(values, gradients, strict=False))

    def _result(self, batch: Batch, values: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> Tensor:
        """What the rounded model gives."""
        held = self.changes | as_read(values, self.learnt)
        for name, value in vectors.items():
            held |= dict.fromkeys(self.vectors[name][1], value)
        return first_output(_Held(self.model, held), batch)

    def _loss(self, batches: Sequence[Batch], *, first: bool = False) -> float:
        """The mean over some batches, of what was given (`first`) or is now."""
        values = {
            name: rounding.best.rounded(rounding.format) if first else rounding.values()
            for name, (_, rounding) in self.learnt.items()
        }
        vectors = {name: value for name, (value, _) in self.vectors.items()}
        total = 0.0
        for batch in batches:
            with self.swaps.lifted():
                exact = first_output(self.model, batch)
            total += float(self._apart(exact, self._result(batch, values, vectors)))
        if not math.isfinite(total):
            raise BitfoldError(
                "tune: the rounded model's result is no number on the batches that are kept aside; look at "
                "the calibration data"
            )
        return total / len(batches)

    def _apart(self, exact: Tensor, found: Tensor) -> Tensor:
        if self.step.aim == "predictions":
            return divergence(exact, found)
        return (found - exact).float().square().mean()

    def _keep(self) -> None:
        for _, rounding in self.learnt.values():
            rounding.keep()
        self.best = {
            path: value.to(self.model.get_parameter(path).dtype)
            for value, paths in self.vectors.values()
            for path in paths
        }


class _Held(nn.Module):
    """A model with other values in place of some parameters."""

    def __init__(self, model: nn.Module, held: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.held = model, held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return called(self.model, self.held, args, kwargs)
