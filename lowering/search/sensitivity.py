"""What each layer's rounding does to the model's output, format by format: measured, one layer at a time.

In: a model, data, candidate formats. Out: a `Sensitivity`: for every layer and format the bits that it costs
and the loss that it brings when that layer alone is rounded.

    table = sensitivity(model, batches, ("int8", "int4[g32]", "int3[g32]"))
    table.loss("model.layers.0.mlp.down_proj", "int3[g32]")       0.0031

The loss of a rounded model is how far its predictions are from the float model's: the Kullback-Leibler
divergence of the last dimension's softmax, the mean over all of its rows. For a language model that is, to
first order, what its cross-entropy rises by, with far less noise. `loss=` gives another one, a function of
(float output, output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import BitfoldError, format
from ...passes.algorithms.draft import DRAFT
from ...passes.core import Progress
from ...passes.note import annotated
from ...passes.recipes import Recipe
from ...passes.rules import Rule, exactly
from ..algorithms.calibration import Batch, Batches, hooked
from ..given_model import module_of
from ..module_scope import Site
from ..outputs import divergence, first_output, float_output
from ..swaps import Swaps
from .layers import Reached, none_fits, one_weight, planned, round_site, tied

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output of the float model, output) -> a scalar, 0 where they agree."""


def lost(loss: Loss, exact: Tensor, found: Tensor) -> float:
    """What a loss says of two outputs. Raises BitfoldError if that is no number."""
    value = loss(exact, found)
    one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)
    if not one:
        what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise BitfoldError(f"loss= takes (float output, output) and returns one number, not {what}")
    return float(value)


@dataclass(frozen=True)
class Choice:
    """One format for one layer: bits that its weight takes, and the loss that it brings."""

    layer: str
    format: str
    bits: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """Every choice that was measured. `numel`: numbers in each layer's weight; `unreached`: the layers that
    the data do not reach, of which nothing is known: a recipe leaves them as they are; `tied`: the other
    layers that read a layer's weight, which is stored once: they have one choice, under the first's path."""

    choices: tuple[Choice, ...]
    numel: dict[str, int]
    unreached: tuple[str, ...] = ()
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, layer: str) -> tuple[Choice, ...]:
        """The choices that one layer has."""
        return tuple(choice for choice in self.choices if choice.layer == layer)

    def everywhere(self, chosen: Iterable[Choice]) -> list[Choice]:
        """The choices of all layers, those of tied ones under each path."""
        return [
            replace(choice, layer=path)
            for choice in chosen
            for path in (choice.layer, *self.tied.get(choice.layer, ()))
        ]

    def loss(self, layer: str, fmt: str) -> float:
        """Raises BitfoldError for what was not measured."""
        text = str(format(fmt))
        found = next((choice for choice in self.of(layer) if choice.format == text), None)
        if found is None:
            raise BitfoldError(f"layer {layer!r} was not measured in {text}")
        return found.loss

    def check_of(self, model: nn.Module) -> None:
        """BitfoldError unless this was measured on such a model: one that has these layers, as large."""
        modules = dict(model.named_modules())
        for layer, count in self.numel.items():
            held = modules[layer].parameters() if layer in modules else ()
            if sum(parameter.numel() for parameter in held) < count:
                raise BitfoldError(
                    f"the table is of another model: it has a layer {layer!r} of {count} numbers, and this "
                    f"{type(model).__name__} has not; measure the table anew"
                )
        if not self.choices:
            raise BitfoldError("the table has no layers; measure it anew")

    def recipe(self, chosen: Sequence[Choice], name: str, more: str = "") -> Recipe:
        """A rule for each layer, those of the commonest format by one rule before them. `more`: said of it,
        behind bits and losses."""
        counts: dict[str, int] = {}
        for choice in chosen:
            counts[choice.format] = counts.get(choice.format, 0) + self.numel[choice.layer]
        common = max(counts, key=counts.__getitem__)
        rules = [Rule(weight=common, on_misfit="report")]
        rules += [
            Rule(match=exactly(choice.layer), weight=choice.format)
            for choice in self.everywhere(chosen)
            if choice.format != common
        ]
        rules += [Rule(match=exactly(layer), skip="the data do not reach it") for layer in self.unreached]
        bits = sum(choice.bits for choice in chosen) / sum(self.numel[choice.layer] for choice in chosen)
        loss = sum(choice.loss for choice in chosen)
        about = f"{bits:.3f} bits a weight with scales; losses by layer add up to {loss:.3g}{more}"
        about += f"; not reached and left alone: {', '.join(self.unreached)}" if self.unreached else ""
        return Recipe(name, tuple(rules), about)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    formats: Sequence[str],
    *,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure every linear in every format that fits it. The model is as it was afterwards.

    Runs the model once for each of them on all of `data`, and holds the float model's output for every batch
    meanwhile (of a language model 4 bytes for each token and word in float32: 16 windows of 2048 tokens at
    128,000 words are 16 GB). Raises BitfoldError for no data, and for data that the model does not take;
    warns of layers that the data do not reach.
    """
    model = module_of(model, "bf.search")
    batches = list(Batches(data, None))
    if not batches:
        raise BitfoldError("there are no batches to measure the layers on; give at least one")
    plans = [(text, planned(model, text)) for text in dict.fromkeys(str(format(one)) for one in formats)]
    reached = Reached(site for _, found in plans for site in found.sites)
    with hooked(model, {}):
        with hooked(model, reached.hooks):
            exact = [float_output(model, batch) for batch in batches]
        unreached = reached.warn_of_others()
        apart = loss or divergence
        choices, numel = [], {}
        groups = [(text, group) for text, found in plans for group in one_weight(reached.of(found.sites))]
        for done, (text, group) in enumerate(groups):
            path = group[0].path
            if progress is not None:
                progress(f"{path} in {text}", done, len(groups))
            (bits, numel[path]), *_ = map(round_site, group)
            brought = _brought(model, group, batches, exact, apart)
            if math.isfinite(brought):  # a format that overflows is no choice
                choices.append(Choice(path, text, bits, brought))
    if not numel:
        raise BitfoldError(none_fits(model, formats))
    endless = sorted(set(numel) - {choice.layer for choice in choices})
    if endless:
        raise BitfoldError(f"in each of {', '.join(formats)} the loss by layer {endless[0]} is not finite")
    return Sensitivity(tuple(choices), numel, unreached, tied(group for _, group in groups))


def percent(loss: float) -> str:
    """Of perplexity, for a loss in nats."""
    return f"{100 * math.expm1(loss) if loss < 700 else math.inf:.3g}%"  # a double ends there


def _brought(
    model: nn.Module, group: Sequence[Site], batches: Sequence[Batch], exact: Sequence[Tensor], loss: Loss
) -> float:
    total = 0.0
    with Swaps() as swaps:
        for site in group:
            swaps.put(site)
        for batch, before in zip(batches, exact, strict=True):
            total += lost(loss, before, first_output(model, batch))
    for site in group:
        for node, _ in annotated(site.gm):
            node.meta.pop(DRAFT, None)  # of all the layers' codes only one's are held
    return total / len(batches)
