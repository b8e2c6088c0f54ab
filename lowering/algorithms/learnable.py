"""The linears of sites whose rounding can be learned: running modules on what was learned, and learning.

In: sites with drafts, or codes and the weights that they came of. Out: a `Rounding` for each weight, by its
path; the values that a module's forward is given in place of its parameters.

    found = roundings(sites, "model.layers.0")       {"mlp.up_proj.weight": (node, Rounding), ...}
    called(block, as_read(values, found), args, kwargs)
    Descent(found, (0.002, 0.0005)).step(1.0, gradients, values)

Embeddings, convolutions, experts and weights that are a computed part of a parameter are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node

from ...formats import Quantized, format
from ...formats.sparsity import Dense
from ...passes import Miss, MissRecord, expression
from ...passes.algorithms.draft import DRAFT, Draft, rows_of
from ...passes.algorithms.learn import Learn
from ...passes.algorithms.rounding import Rounding, moves
from ...passes.algorithms.tune import Tune
from ...passes.anchors import TARGETS
from ...passes.core import below
from ...passes.note import Note, annotated
from ..module_scope import Site
from ..turned import turned
from .correct_biases import FLOAT

Learnt = dict[str, tuple[Node, Rounding]]
"""The anchor and the rounding of each weight, by the parameter's path."""


def roundings(sites: Sequence[Site], root: str) -> Learnt:
    """By paths that begin behind `root`."""
    found: Learnt = {}
    for site in sites:
        for node, note in annotated(site.gm):
            if not note.weight or note.stored:
                continue
            path, draft = _learnable(site, node, note), _draft(site, node, note)
            if isinstance(path, Miss) or draft is None:
                continue
            name = below(path, root)
            found[name] = node, Rounding(format(note.weight), draft, turned(node))
    return found


def falls_short(step: Learn | Tune, sites: Sequence[Site]) -> Iterator[MissRecord]:
    """What weights of these sites do not get of `step`, and why."""
    for site in sites:
        for node, note in annotated(site.gm):
            if not note.weight or note.stored:
                continue
            path, fmt = _learnable(site, node, note), format(note.weight)
            if isinstance(path, Miss):
                yield MissRecord(site.path, site.path, "", step.name, path.reason)
            elif step.scales and not moves(fmt):
                reason = f"scales of {fmt} are powers of two or have zeros beside them; they are not learned"
                yield MissRecord(site.path, site.path, "", step.name, reason)


def _learnable(site: Site, node: Node, note: Note) -> str | Miss:
    """The path of the parameter that an anchor's rounding is learned for, or why it is not."""
    fmt = format(str(note.weight))
    if note.anchor != "linear":
        return Miss(f"learning is for linears; this {note.anchor} keeps the codes that it has")
    operand = node.args[TARGETS[node.target][2]]
    held = expression(site.gm, operand) if isinstance(operand, Node) else None
    if held is None or held.text:
        return Miss("its weight is computed from a parameter, so its rounding is not learned")
    if fmt.scale is None:
        return Miss(f"{fmt} has no scales: each number is cast by itself")
    if not isinstance(fmt.sparsity, Dense):
        return Miss(f"{fmt} stores some of the columns only, and learning is for dense formats")
    return held.path


def as_read(values: Mapping[str, Tensor], learnt: Learnt) -> dict[str, Tensor]:
    """The weights for modules that run no transform of their inputs yet."""
    return {
        name: torch.ops.bitfold.hadamard(value, True) if learnt[name][1].turned else value
        for name, value in values.items()
    }


def called(module: nn.Module, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The module with these in place of its parameters, in their dtypes."""
    held: dict[tuple[nn.Module, str], tuple[str, Tensor]] = {}
    for name, value in values.items():
        prefix, _, own = name.rpartition(".")
        # Once, where a module stands in two places: it cannot be given its parameter twice.
        held.setdefault((module.get_submodule(prefix), own), (name, value))
    found = {name: value.to(module.get_parameter(name).dtype) for name, value in held.values()}
    return functional_call(module, found, args, kwargs, tie_weights=False)


class Descent:
    """Adam on what roundings and other leaves move by, at rates that fall to zero.

    Adam rather than the sign of each gradient, which moves what is noise as far as what is not: rates have to
    be so small that codes of one weight are turned a few at a time, each seeing the others.
    """

    def __init__(
        self, learnt: Learnt, rates: tuple[float, float], more: Sequence[tuple[Tensor, float]] = ()
    ) -> None:
        """rates: of shifts and stretches, in their units; more: other leaves, each with its rate."""
        self.learnt = learnt
        shifts = [rounding.shift for _, rounding in learnt.values()]
        stretches = [r.stretch for _, r in learnt.values() if r.stretch is not None]
        kinds = [(shifts, rates[0]), (stretches, rates[1]), *(([leaf], rate) for leaf, rate in more)]
        groups: list[dict[str, Any]] = [{"params": ls, "lr": rate} for ls, rate in kinds if ls and rate]
        self.rates = [group["lr"] for group in groups]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.99)) if groups else None

    def step(self, left: float, gradients: Mapping[str, Tensor | None], values: Mapping[str, Tensor]) -> None:
        """One step at `left` of the rates. gradients: of the loss by each rounding's `values`; other leaves
        have theirs already. What has none stays (an expert that no token was sent to)."""
        if self.adam is None:
            return
        for name, (_, rounding) in self.learnt.items():
            found = gradients.get(name)
            slopes = [None, None] if found is None else rounding.slopes(found, values[name].detach())
            for leaf, slope in zip(rounding.movable(), slopes, strict=False):
                leaf.grad = slope
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = left * rate
        self.adam.step()
        for _, rounding in self.learnt.values():
            rounding.bound()


def _draft(site: Site, node: Node, note: Note) -> Draft | None:
    """What has been decided, beside the float weight that it was decided for."""
    found = node.meta.get(DRAFT)
    if isinstance(found, Draft):
        return found
    if not isinstance(found, Quantized):
        return None
    weight = node.meta.get(FLOAT)
    if weight is None:
        weight = rows_of(site.gm, node, note)
    elif turned(node):
        weight = torch.ops.bitfold.hadamard(weight)
    return None if weight is None else Draft(weight.float(), tuple(found.params), found.dequantize())
