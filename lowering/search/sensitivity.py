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
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...formats import BitfoldError, format
from ...passes.algorithms.draft import DRAFT, draft_of
from ...passes.core import Progress
from ...passes.note import annotated
from ...passes.observing.batch import Batch
from ...passes.recipes import Recipe
from ...passes.rules import Rule, exactly
from ..algorithms.at_rest import at_rest, hooked
from ..algorithms.calibration import Batches
from ..diagnose import first_output
from ..given_model import module_of
from ..module_scope import Plan, Site, plan
from ..swaps import Swaps

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output of the float model, output) -> a scalar, 0 where they agree."""


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
    the data do not reach, of which nothing is known: a recipe leaves them as they are."""

    choices: tuple[Choice, ...]
    numel: dict[str, int]
    unreached: tuple[str, ...] = ()

    def of(self, layer: str) -> tuple[Choice, ...]:
        """The choices that one layer has."""
        return tuple(choice for choice in self.choices if choice.layer == layer)

    def loss(self, layer: str, fmt: str) -> float:
        """Raises BitfoldError for what was not measured."""
        text = str(format(fmt))
        found = next((choice for choice in self.of(layer) if choice.format == text), None)
        if found is None:
            raise BitfoldError(f"layer {layer!r} was not measured in {text}")
        return found.loss

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
            for choice in chosen
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

    Runs the model once for each of them on all of `data`. Raises BitfoldError for no data, and for data that
    the model does not take; warns of layers that the data do not reach.
    """
    model = module_of(model, "bf.search")
    batches = list(Batches(data, None))
    if not batches:
        raise BitfoldError("there are no batches to measure the layers on; give at least one")
    plans = [(text, _plan(model, text)) for text in dict.fromkeys(str(format(one)) for one in formats)]
    reached = Reached(site for _, found in plans for site in found.sites)
    with at_rest(model):
        with hooked(model, reached.hooks):
            exact = [first_output(model, batch) for batch in batches]
        spoilt = next((b for b, one in zip(batches, exact, strict=True) if bool(one.isnan().any())), None)
        if spoilt is not None:
            raise BitfoldError(f"the float model's output for {spoilt.name} has NaN in it; leave it out")
        unreached = reached.warn_of_others()
        measured = loss or divergence
        choices, numel = [], {}
        sites = [(text, site) for text, found in plans for site in reached.of(found.sites)]
        for done, (text, site) in enumerate(sites):
            if progress is not None:
                progress(f"{site.path} in {text}", done, len(sites))
            bits, count = round_site(site)
            numel[site.path] = count
            brought = _brought(model, site, batches, exact, measured)
            if math.isfinite(brought):  # a format that overflows is no choice
                choices.append(Choice(site.path, text, bits, brought))
    if not numel:
        raise BitfoldError(none_fits(model, formats))
    lost = sorted(set(numel) - {choice.layer for choice in choices})
    if lost:
        raise BitfoldError(f"in each of {', '.join(formats)} the loss by layer {lost[0]} is not finite")
    return Sensitivity(tuple(choices), numel, unreached)


def none_fits(model: nn.Module, formats: Sequence[str]) -> str:
    """Why there is nothing to choose from."""
    return f"none of {', '.join(formats)} fits a linear of this {type(model).__name__} that the data reach"


class Reached:
    """Which of some layers run while `hooks` are on a model."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.paths = {site.module: site.path for site in sites}
        self.seen: set[nn.Module] = set()
        self.hooks = dict.fromkeys(self.paths, self._note)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen.add(module)

    def of(self, sites: Iterable[Site]) -> list[Site]:
        """Those that have run."""
        return [site for site in sites if site.module in self.seen]

    def warn_of_others(self) -> tuple[str, ...]:
        """The paths of the others. A layer that never runs would cost nothing in the smallest format."""
        others = tuple(path for module, path in self.paths.items() if module not in self.seen)
        if others:
            warnings.warn(
                f"no batch reaches layer {', '.join(others)}, so nothing is known of what its rounding "
                "costs, and the recipe leaves it alone; give batches that reach it",
                stacklevel=3,
            )
        return others


def divergence(exact: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the softmax of the last dimension, the mean over the others, in nats."""
    before, after = exact.float().log_softmax(-1), found.float().log_softmax(-1)
    # What both mask by -inf is the same prediction, and not the difference of two infinities.
    masked = (before == -math.inf) & (after == -math.inf)
    before, after = before.masked_fill(masked, 0.0), after.masked_fill(masked, 0.0)
    return F.kl_div(after.flatten(0, -2), before.flatten(0, -2), reduction="batchmean", log_target=True)


def _plan(model: nn.Module, text: str) -> Plan:
    return plan(model, Recipe(text, (Rule(weight=text, on_misfit="report"),)), stored={})


def round_site(site: Site) -> tuple[float, int]:
    """Put rounded codes on the site's anchors; the bits they take and the numbers they stand for."""
    bits, count = 0.0, 0
    for node, note in annotated(site.gm):
        draft = draft_of(site.gm, node, note)
        if draft is None or not note.weight:
            continue
        fmt = format(note.weight)
        node.meta[DRAFT] = draft.quantized(fmt)
        bits += fmt.bits_per_element(draft.weight.shape) * draft.weight.numel()
        count += draft.weight.numel()
    return bits, count


def _brought(
    model: nn.Module, site: Site, batches: Sequence[Batch], exact: Sequence[Tensor], loss: Loss
) -> float:
    total = 0.0
    with Swaps() as swaps:
        swaps.put(site)
        for batch, before in zip(batches, exact, strict=True):
            total += float(loss(before, first_output(model, batch)))
    for node, _ in annotated(site.gm):
        node.meta.pop(DRAFT, None)  # of all the layers' codes only one's are held
    return total / len(batches)
