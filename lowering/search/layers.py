"""The layers that a search gives formats: which take one, which run, which are one weight; their rounding.

In: a model and a format. Out: sites, as `module_scope` plans them.

    planned(model, "int4[g32]").sites      every linear that the format fits
    one_weight(sites)                      [[q], [k], [first, last]]: tied ones together, stored once
    round_site(site)                       (18432.0, 4096): rounded codes on it, their bits and numbers
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from ...formats import format
from ...passes import expression
from ...passes.algorithms.draft import DRAFT, draft_of
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ...passes.recipes import Recipe
from ...passes.rules import Rule
from ..module_scope import Plan, Site, plan


def planned(model: nn.Module, text: str) -> Plan:
    """The layers that take a format, of all linears."""
    return plan(model, everywhere(text), stored={})


def everywhere(text: str) -> Recipe:
    """One format for every linear that it fits."""
    return Recipe(text, (Rule(weight=text, on_misfit="report"),))


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


def one_weight(sites: Iterable[Site]) -> list[list[Site]]:
    """The sites, those that read the same parameters together."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        read = []
        for node, note in annotated(site.gm):
            operand = node.args[TARGETS[node.target][2]]
            chain = expression(site.gm, operand) if isinstance(operand, Node) and note.weight else None
            read.append(None if chain is None else id(chain.parameter))
        groups.setdefault(tuple(read) if read and None not in read else site.path, []).append(site)
    return list(groups.values())


def tied(groups: Iterable[Sequence[Site]]) -> dict[str, tuple[str, ...]]:
    """The paths of each group, behind its first."""
    return {group[0].path: tuple(site.path for site in group[1:]) for group in groups if len(group) > 1}


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
