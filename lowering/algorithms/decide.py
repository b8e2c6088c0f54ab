"""Codes of one layer after another: decided by the solvers, taken from an earlier run, or from a tied layer.

In: a site with statistics of its inputs on the anchors. Out: a `Quantized` on each anchor; where a block is
decided together (`learn`), a draft until it is settled.

    decider.begin(block's sites); decider.solve(q_proj); decider.settle(q_proj)

A parameter that several modules have is decided once, and the others take its codes. With a folder of results
each layer's codes are written when they are settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from ...formats import Quantized, format
from ...passes import expression
from ...passes.algorithms.draft import DRAFT, Draft, draft_of
from ...passes.algorithms.inputs import INPUTS
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ..module_scope import Site
from ..turned import turned
from .algorithm import Algorithm
from .correct_biases import FLOAT
from .places import Whole
from .results import Results, drafts_of


@dataclass
class Decider:
    """Runs the solvers on one site after another, or takes what an earlier run has found."""

    whole: Whole
    algorithm: Algorithm
    results: Results | None
    done: int = 0
    drafts: dict[str, list[str]] = field(default_factory=dict)  # of the sites that are being solved
    anew: bool = False  # what an earlier run has found of this block is not taken
    tied: frozenset[int] = frozenset()  # parameters that several modules have
    settled: dict[tuple[int, str, str], tuple[str, Quantized]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)  # sites that have another's codes

    def __post_init__(self) -> None:
        self.total = len(self.whole.sites)

    def restored(self, sites: Sequence[Site]) -> bool:
        """Whether an earlier run has found the codes of all of these; they are put on the anchors then."""
        return self.results is not None and not self.anew and all(map(self.results.restore, sites))

    def begin(self, sites: Sequence[Site]) -> None:
        """A block: what is decided together is taken up together, or decided anew."""
        self.anew = False
        self.anew = self.algorithm.together and not (
            self.results is not None and all(map(self.results.holds, sites))
        )

    def solve(self, site: Site) -> None:
        if self.whole.progress is not None:
            self.whole.progress(f"{self.algorithm} {site.path}", self.done, self.total)
        self.done += 1
        if self.restored([site]) or self._shared(site):
            for node, key in _tied_weights(site, self.tied):
                self.settled.setdefault(key, (site.path, node.meta[DRAFT]))
            return
        if self.results is not None:
            self.drafts[site.path] = drafts_of(site)
        self.whole.found.misses += self.algorithm.solve.run(site.gm, verify=False, record=False).misses
        for node, note in annotated(site.gm):
            node.meta.pop(INPUTS, None)
            if self.algorithm.together and DRAFT not in node.meta:
                draft = draft_of(site.gm, node, note)
                if draft is not None and note.weight and not note.stored:
                    node.meta[DRAFT] = draft
        if not self.algorithm.together:
            self.settle(site)

    def _shared(self, site: Site) -> bool:
        """Whether its weight is another layer's too, which has been decided; it takes those codes."""
        keys = list(_tied_weights(site, self.tied))
        if not keys or any(DRAFT in node.meta or key not in self.settled for node, key in keys):
            return False
        self.taken.add(site.path)
        for node, key in keys:
            path, codes = self.settled[key]
            node.meta[DRAFT] = codes
            reason = f"its weight is that of {path} too, where {self.algorithm} has decided its codes"
            self.whole.miss(site.path, str(self.algorithm), reason)
        return True

    def settle(self, site: Site) -> None:
        """Codes of what was decided; nothing more is done to them."""
        decided = False
        unchanged = dict(_tied_weights(site, self.tied))
        for node, note in annotated(site.gm):
            draft = node.meta.get(DRAFT)
            if isinstance(draft, Draft):
                assert note.weight is not None
                if self.algorithm.wants_floats and self.algorithm.changes_weights:
                    w = draft.weight
                    w = torch.ops.bitfold.hadamard(w, True) if turned(node) else w
                    node.meta[FLOAT] = w.to(_operand(node).dtype)
                codes = draft.quantized(format(note.weight))
                if node in unchanged:
                    codes = self.settled.setdefault(unchanged[node], (site.path, codes))[1]
                node.meta[DRAFT], decided = codes, True
        if self.results is not None and decided:
            self.results.keep(site, self.drafts.pop(site.path))


def _operand(node: Node) -> Tensor:
    """The weight of an anchor, as it was captured."""
    operand = node.args[TARGETS[node.target][2]]
    assert isinstance(operand, Node)
    value: Tensor = operand.meta["val"]
    return value


def _tied_weights(site: Site, tied: frozenset[int]) -> Iterator[tuple[Node, tuple[int, str, str]]]:
    """Anchors whose weight is a parameter of several modules: which it is, how it is read, in what format."""
    for node, note in annotated(site.gm):
        operand = node.args[TARGETS[node.target][2]]
        chain = expression(site.gm, operand) if isinstance(operand, Node) and note.weight else None
        if chain is not None and id(chain.parameter) in tied:
            yield node, (id(chain.parameter), chain.text, str(note.weight))
