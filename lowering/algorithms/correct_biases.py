"""Biases that take off what rounding adds to each layer's result on average.

In: a model, its sites with codes on their anchors, batches. Out: new values for biases, by path.

    mean over the data of (float layer - rounded layer)(what comes in)   ->  added to `fc.bias`

All layers are measured in one run of the rounded model. What comes in is behind rounded layers; a layer that
rounds its input anew in each call has that in its error too. Ranges that are calibrated are found
afterwards, so their rounding is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...formats import format
from ...passes import Miss
from ...passes.algorithms.correct_bias import CorrectBias
from ...passes.algorithms.draft import DRAFT, draft_of
from ...passes.note import Note, annotated
from ...passes.provenance import inherit
from ...passes.scopes.module import is_stock
from ..module_scope import Site
from ..swaps import as_decided
from .at_rest import hooked
from .places import Whole, work

FLOAT = "bitfold_float"
"""In `node.meta` of a linear's anchor: its weight before rounding, where that is not the module's."""

_BIAS = 2
"""Where linear and convolutions take it."""


@work.register
def correct_biases(step: CorrectBias, at: Whole) -> None:
    """New biases. What is left alone is among the plan's misses."""
    model, found, changes = at.model, at.found, at.changes
    chosen: dict[nn.Module, _Error] = {}
    for site in found.sites:
        round_plainly(site)
        picked = _anchor(site, step)
        if isinstance(picked, Miss):
            at.miss(site.path, step.name, picked.reason)
        elif picked is not None:
            chosen[site.module] = _Error(site, *picked)
    before = {module: one.before for module, one in chosen.items()}
    after = {module: one.after for module, one in chosen.items()}
    # In this order: the hooks that round a layer's input come behind those that note what it is given.
    with hooked(model, before, after), as_decided(model, changes, found):
        for batch in at.batches:
            batch.run(model)
    corrected: dict[str, Tensor] = {}
    for module, one in chosen.items():
        path = f"{one.site.path}.bias".lstrip(".")
        held = changes.get(path, module._parameters.get("bias"))
        if one.mean is None:
            continue
        if held is None:
            _add_bias(one.site.gm, one.node, one.mean)
            held = torch.zeros_like(one.mean)
        corrected[path] = (held.detach() + one.mean.to(held.device)).to(one.weight.dtype)
    at.changes |= corrected


def round_plainly(site: Site) -> None:
    """Codes by plain rounding for what no solver has decided."""
    for node, note in annotated(site.gm):
        if note.weight and not note.stored and DRAFT not in node.meta:
            draft = draft_of(site.gm, node, note)
            if draft is not None:
                node.meta[DRAFT] = draft.quantized(format(note.weight))


def _anchor(site: Site, step: CorrectBias) -> tuple[Node, Note] | Miss | None:
    """The one anchor of a stock linear or convolution that gets a bias; None where there is none to get."""
    found = [(node, note) for node, note in annotated(site.gm) if note.weight]
    if not found or found[0][1].anchor == "embedding":
        return None
    if len(found) > 1 or not is_stock(site.module):
        return Miss("its result has no one bias: it is no plain linear or convolution")
    if site.module._parameters.get("bias") is None and not step.add:
        return Miss("it has no bias, and correct_bias{add=true} would give it one")
    return found[0]


class _Error:
    """The mean of one layer's error, channel by channel, while batches run."""

    def __init__(self, site: Site, node: Node, note: Note) -> None:
        self.site, self.node = site, node
        self.channels = -1 if note.anchor == "linear" else 1 - len(site.module.weight.shape)  # type: ignore[arg-type]
        held: Tensor = site.module._parameters["weight"]  # type: ignore[assignment]
        own = node.meta.get(FLOAT)
        self.weight = held if own is None else nn.Parameter(own.to(held.dtype), requires_grad=False)
        self.given: list[Any] = []
        self.count = 0
        self.mean: Tensor | None = None

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.given.append((args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, result: Tensor) -> None:
        rounded = module._parameters["weight"]
        module._parameters["weight"] = self.weight  # type: ignore[assignment]
        try:
            args, kwargs = self.given.pop()
            exact = module.forward(*args, **kwargs)
        finally:
            module._parameters["weight"] = rounded
        apart = (exact - result).detach().float().movedim(self.channels, -1)
        apart = apart.reshape(-1, apart.shape[-1])  # of a single vector too
        if not len(apart):  # an expert that got no token
            return
        self.count += len(apart)
        if self.mean is None:
            self.mean = torch.zeros(apart.shape[-1], device=apart.device)
        self.mean.lerp_(apart.mean(0), len(apart) / self.count)


def _add_bias(gm: GraphModule, node: Node, like: Tensor) -> None:
    """The operand that the layer has not had; its numbers come with the module's new parameter."""
    name = "bias"
    gm.register_parameter(name, nn.Parameter(torch.zeros_like(like, dtype=node.meta["val"].dtype)))
    with gm.graph.inserting_before(node):
        operand = gm.graph.create_node("get_attr", name, name=name)
    operand.meta["val"] = node.meta["val"].new_empty(like.shape)
    inherit(operand, [node])
    if len(node.args) > _BIAS:
        node.update_arg(_BIAS, operand)
    else:
        node.args = (*node.args, operand)
    gm.recompile()
