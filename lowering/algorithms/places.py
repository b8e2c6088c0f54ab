"""What passes on a model are given (`passes/algorithms/on_model.py`), and how they say what they do.

In: a pass, and a model or one of its blocks with all that is known of it. Out: drafts on anchors, new values
of parameters, misses: written into what was given.

    @work.register
    def halve(step: Halve, at: Block) -> None:
        for node, rounding in roundings(at.sites, at.path).values(): ...

A pass whose place is "model before" or "model after" is given the `Whole`, one on blocks the `Block`. The
model is in eval mode, without gradients, and is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, singledispatch
from typing import Any

from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes import MissRecord
from ...passes.algorithms.on_model import OnModel
from ...passes.core import Progress
from ...passes.note import annotated
from ...passes.observing.batch import Batch
from ..module_scope import Plan, Site
from ..swaps import Swaps
from .blocks import Chain
from .used_once import used_more_than_once


@dataclass
class Whole:
    """`changes`: new values of parameters that take no codes, by path; `swaps`: what is put into the model by
    them stays until all codes are decided; `kept`: what a pass remembers from block to block, by a key of its
    own."""

    model: nn.Module
    found: Plan
    batches: Sequence[Batch]
    swaps: Swaps
    progress: Progress | None = None
    changes: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[Hashable, Any] = field(default_factory=dict)

    @cached_property
    def sites(self) -> list[Site]:
        """Those whose weights take codes."""
        return [site for site in self.found.sites if any(note.weight for _, note in annotated(site.gm))]

    @cached_property
    def shared(self) -> frozenset[int]:
        """Identities of the parameters that are read in more than one place."""
        return used_more_than_once(self.model, self.batches[0])

    def miss(self, path: str, asked: str, reason: str) -> None:
        """Something that a layer or block does not get, for `bf.report`."""
        self.found.misses.append(MissRecord(path, path, "", asked, reason))


@dataclass
class Block:
    """One block of a chain. `targets`: what it gives in the float model, batch by batch, for passes that come
    after; `swaps`: what is put into the model by them stays until the block is done."""

    whole: Whole
    chain: Chain
    place: int
    sites: Sequence[Site]
    swaps: Swaps
    targets: Sequence[Tensor] = ()

    @property
    def module(self) -> nn.Module:
        return self.chain.blocks[self.place]

    @property
    def path(self) -> str:
        return self.chain.paths[self.place]


@singledispatch
def work(step: OnModel, at: Any) -> None:
    """Do what the pass is for. `at`: a `Whole` or a `Block`, as its place is."""
    raise BitfoldError(
        f"nothing is registered for {step.name} to do; define a function of it and decorate it with "
        "work.register (bitfold.lowering.algorithms.places)"
    )
