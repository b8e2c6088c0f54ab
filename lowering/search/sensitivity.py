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
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...formats import BitfoldError, format
from ...passes.algorithms.draft import DRAFT, draft_of
from ...passes.note import annotated
from ...passes.recipes import Recipe
from ...passes.rules import Rule
from ..algorithms.calibration import Batch, Batches, hooked
from ..diagnose import buffers_kept, first_output
from ..given_model import module_of
from ..module_scope import Plan, Site, Step, plan
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
    """Every choice that was measured. `numel`: numbers in each layer's weight."""

    choices: tuple[Choice, ...]
    numel: dict[str, int]

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
        bits = sum(choice.bits for choice in chosen) / sum(self.numel[choice.layer] for choice in chosen)
        loss = sum(choice.loss for choice in chosen)
        about = f"{bits:.3f} bits a weight with scales; losses by layer add up to {loss:.3g}{more}"
        return Recipe(name, tuple(rules), about)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    formats: Sequence[str],
    *,
    loss: Loss | None = None,
    progress: Step | None = None,
) -> Sensitivity:
    """Measure every linear in every format that fits it. The model is as it was afterwards.

    Runs the model once for each of them on all of `data`; a layer that no data reaches has its finest format
    alone. Raises BitfoldError for no data, and for data that the model does not take.
    """
    model = module_of(model, "bf.search")
    batches = list(Batches(data, None))
    if not batches:
        raise BitfoldError("there are no batches to measure the layers on; give at least one")
    reached: set[nn.Module] = set()
    plans = [(text, _plan(model, text)) for text in dict.fromkeys(str(format(one)) for one in formats)]
    seen = {site.module: lambda module, *_: reached.add(module) for _, found in plans for site in found.sites}
    with hooked(model, {}), buffers_kept(model):
        with hooked(model, seen):
            exact = [run(model, batch) for batch in batches]
        spoilt = next((b for b, one in zip(batches, exact, strict=True) if bool(one.isnan().any())), None)
        if spoilt is not None:
            raise BitfoldError(f"the float model's output for {spoilt.name} has NaN in it; leave it out")
        measured = loss or divergence
        choices, numel, unseen = [], {}, set()
        total, done = sum(len(found.sites) for _, found in plans), 0
        for text, found in plans:
            for site in found.sites:
                if progress is not None:
                    progress(f"{site.path} in {text}", done, total)
                done += 1
                bits, count = round_site(site)
                numel[site.path] = count
                brought = 0.0
                if site.module in reached:
                    brought = _brought(model, site, batches, exact, measured)
                else:
                    unseen.add(site.path)
                if math.isfinite(brought):  # a format that overflows is no choice
                    choices.append(Choice(site.path, text, bits, brought))
    if not numel:
        raise BitfoldError(f"none of {', '.join(formats)} fits a linear of this {type(model).__name__}")
    lost = sorted(set(numel) - {choice.layer for choice in choices})
    if lost:
        raise BitfoldError(f"in each of {', '.join(formats)} the loss by layer {lost[0]} is not finite")
    return Sensitivity(tuple(finest(choices, unseen)), numel)


def finest(choices: Iterable[Choice], layers: Container[str]) -> Iterator[Choice]:
    """Of layers that no data reaches, whose losses nothing is known of, the choice of the most bits alone."""
    found = list(choices)
    most: dict[str, float] = {}
    for choice in found:
        most[choice.layer] = max(choice.bits, most.get(choice.layer, 0.0))
    for choice in found:
        if choice.layer not in layers or choice.bits == most[choice.layer]:
            yield choice


def exactly(path: str) -> str:
    """A rule's `match` for this one path, whatever letters it has."""
    return path if not set(path) & set("*?[]") and not path.startswith("re:") else "re:" + re.escape(path)


def run(model: nn.Module, batch: Batch) -> Tensor:
    """The output, each run from the same state as the one before."""
    with buffers_kept(model):
        return first_output(model, batch)


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
            total += float(loss(before, run(model, batch)))
    for node, _ in annotated(site.gm):
        node.meta.pop(DRAFT, None)  # of all the layers' codes only one's are held
    return total / len(batches)
