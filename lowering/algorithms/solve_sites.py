"""Algorithms over a whole model: block by block, each block seeing what the rounded ones before it really
give.

In: a plan (`module_scope.py`), an algorithm and calibration batches. Out: codes on the anchors
of the plan's graphs, where `fold` finds them; the model itself is as it was.

    solve_sites(model, found, algorithm_of("awq,clip,gptq"), batches)
        every batch once through the float model      what each block is called with, and that all is well
        block 0, balanced: q, k, v    inputs measured, solved, the rounded weights put in
                 o; gate, up; down                    each after what it depends on
        block 0 again, on rounded weights             what block 1 gets; float weights are put back
        block 1 ...

So beside the model and the codes there are one block's rounded weights, the second moments of layers that
share an input, and one hidden value a batch. An encoder and a decoder are walked one after the other, each
from what the float model gives it. Layers outside the blocks, and all layers of a model that is no chain of
blocks, are measured in the float run and solved by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...formats import BitfoldError, Quantized, format
from ...passes import Miss, MissRecord, expression
from ...passes.algorithms.draft import DRAFT, Draft, draft_of
from ...passes.algorithms.inputs import INPUTS
from ...passes.anchors import TARGETS
from ...passes.note import annotated
from ..module_scope import Plan, Site, Step
from ..parameters import parameter_names
from ..swaps import Swaps
from ..turned import turned
from .algorithm import Algorithm
from .balance_block import Balance
from .blocks import Chain, without_cache
from .calibration import Batch, hooked, in_order
from .correct_biases import FLOAT, correct_biases
from .float_run import recorded, within
from .learn_block import learn_block
from .learnable import falls_short
from .measure import Pairs, measure, once
from .results import Results, drafts_of
from .rotate_model import rotate_model
from .tune_model import tune_model
from .used_once import used_more_than_once


@torch.no_grad()
def solve_sites(
    model: nn.Module,
    found: Plan,
    algorithm: Algorithm,
    batches: Sequence[Batch],
    *,
    results: Results | None = None,
    progress: Step | None = None,
) -> dict[str, Tensor]:
    """Decide the codes of every weight of the plan, and return new values for parameters that take none.
    Raises BitfoldError, before long work begins, for batches that
    do not go through the model, give NaN, or miss a layer."""
    sites = [site for site in found.sites if any(note.weight for _, note in annotated(site.gm))]
    tied = frozenset(key for key, paths in parameter_names(model).items() if len(paths) > 1)
    solver = _Solver(algorithm, results, progress, len(sites), tied=tied)
    changes: dict[str, Tensor] = {}
    if not algorithm.needs_data:
        for site in sites:
            solver.solve(site)
        found.misses += solver.misses
        return {}
    if not batches:
        raise BitfoldError(f"{algorithm} measures what goes into each layer; give calibration=[batches]")
    if algorithm.wants_floats and algorithm.changes_weights and results is not None:
        name = (algorithm.correct or algorithm.tune).name  # type: ignore[union-attr]
        raise BitfoldError(
            f"{name} compares with float weights that other passes have changed, which resume does not keep; "
            "leave one of the two out"
        )
    for site in sites:
        if algorithm.balance and any(note.output and note.observer for _, note in annotated(site.gm)):
            raise BitfoldError(
                f"layer {site.path} has an output of calibrated range, which {algorithm.balance[0].name} "
                "would change afterwards; leave the format of outputs to the layers that read them"
            )
    with without_cache(model), Swaps() as swaps:
        if algorithm.rotate is not None:
            with hooked(model, {}):
                changes = rotate_model(algorithm.rotate, model, batches[0], sites, swaps)
        changes |= _walk(model, found, sites, solver, batches)
    found.misses += solver.misses
    with without_cache(model):
        if algorithm.tune is not None:
            found.misses += falls_short(algorithm.tune, found.sites)
            changes |= tune_model(algorithm.tune, model, found, batches, changes, progress)
        if algorithm.correct is not None:
            changes |= correct_biases(algorithm.correct, model, found, batches, changes)
    return changes


def _walk(
    model: nn.Module, found: Plan, sites: Sequence[Site], solver: _Solver, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Every site solved, block by block where the model is a chain of them."""
    algorithm = solver.algorithm
    shared = used_more_than_once(model, batches[0]) if algorithm.balance else frozenset()
    balance = Balance(algorithm.balance, shared)
    chains, rest = recorded(model, sites, batches, algorithm.measures)
    name = algorithm.on_blocks()
    if isinstance(chains, Miss):
        if name:
            raise BitfoldError(f"{name} works on a chain of blocks, and this model is none: {chains.reason}")
        reason = f"{chains.reason}, so each layer is measured in the float model"
        found.misses.append(MissRecord("", "", "", str(algorithm), reason))
        chains = []
    for chain in chains:
        _walk_chain(model, chain, sites, solver, balance)
    for site in rest:
        if name and chains:
            blocks = " and ".join(f"{chain.paths[0]} to {chain.paths[-1]}" for chain in chains)
            reason = f"{name} works on the blocks {blocks}, and this is outside them"
            solver.misses.append(MissRecord(site.path, site.path, "", str(algorithm), reason))
        solver.solve(site)
        solver.settle(site)
    found.misses += balance.misses
    return balance.changes


def _walk_chain(
    model: nn.Module, chain: Chain, sites: Sequence[Site], solver: _Solver, balance: Balance
) -> None:
    """Its blocks one after the other."""
    if solver.algorithm.learn is not None or solver.algorithm.wants_exact:
        chain.exact = list(chain.given)
    with hooked(model, {}):
        for place, path in enumerate(chain.paths):
            inside = [site for site in sites if within(site.path, path)]
            with hooked(chain.blocks[place], {}):  # each of its runs starts from the same buffers
                _solve_block(chain, place, inside, solver, balance)
    # Hidden values of a chain that is done need not stay while the next one is walked.
    chain.given, chain.exact, chain.calls = [], [], []


@dataclass
class _Solver:
    """Runs the passes on one site after another, or takes what an earlier run has found."""

    algorithm: Algorithm
    results: Results | None
    progress: Step | None
    total: int
    done: int = 0
    drafts: dict[str, list[str]] = field(default_factory=dict)  # of the sites that are being solved
    anew: bool = False  # what an earlier run has found of this block is not taken
    tied: frozenset[int] = frozenset()  # parameters that several modules have
    settled: dict[tuple[int, str, str], tuple[str, Quantized]] = field(default_factory=dict)
    misses: list[MissRecord] = field(default_factory=list)

    def known(self, sites: Sequence[Site]) -> bool:
        """Whether an earlier run has found the codes of all of these; they are put on the anchors then."""
        return self.results is not None and not self.anew and all(map(self.results.restore, sites))

    def begin(self, sites: Sequence[Site]) -> None:
        """A block: what `learn` decides together is taken up together, or decided anew."""
        self.anew = False
        self.anew = self.algorithm.learn is not None and not (
            self.results is not None and all(map(self.results.holds, sites))
        )

    def solve(self, site: Site) -> None:
        if self.progress is not None:
            self.progress(f"{self.algorithm} {site.path}", self.done, self.total)
        self.done += 1
        if self.known([site]) or self._shared(site):
            for node, key in _tied_weights(site, self.tied):
                self.settled.setdefault(key, (site.path, node.meta[DRAFT]))
            return
        if self.results is not None:
            self.drafts[site.path] = drafts_of(site)
        self.misses += self.algorithm.solve.run(site.gm, verify=False, record=False).misses
        for node, note in annotated(site.gm):
            node.meta.pop(INPUTS, None)
            if self.algorithm.learn is not None and DRAFT not in node.meta:
                draft = draft_of(site.gm, node, note)
                if draft is not None and note.weight and not note.stored:
                    node.meta[DRAFT] = draft
        if self.algorithm.learn is None:
            self.settle(site)

    def _shared(self, site: Site) -> bool:
        """Whether its weight is another layer's too, which has been decided; it takes those codes."""
        keys = list(_tied_weights(site, self.tied))
        if not keys or any(DRAFT in node.meta or key not in self.settled for node, key in keys):
            return False
        for node, key in keys:
            path, codes = self.settled[key]
            node.meta[DRAFT] = codes
            reason = f"its weight is that of {path} too, where {self.algorithm} has decided its codes"
            self.misses.append(MissRecord(site.path, site.path, "", str(self.algorithm), reason))
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


def _solve_block(chain: Chain, place: int, sites: list[Site], solver: _Solver, balance: Balance) -> None:
    """Solve the sites of one block, then bring every batch behind it, through its rounded weights."""
    pairs = Pairs() if solver.algorithm.wants_exact else None
    # What the block gives in the float model. Only where learning wants it and solving wants what goes in are
    # both there at once.
    exact = chain.exact if pairs is None else list(chain.exact)
    if solver.algorithm.learn is not None:
        for batch, given in enumerate(exact):
            exact[batch] = chain.behind(place, batch, given)
    targets = [one.hidden for one in exact] if solver.algorithm.learn is not None else []
    with Swaps() as swaps:

        def run() -> None:
            for batch in range(len(chain.hidden)):
                if pairs is not None:
                    with swaps.lifted(), pairs.first():
                        once(partial(chain.run_exact, place, batch))
                once(partial(chain.run, place, batch))

        if balance.steps:
            balance.apply(chain, place, sites, swaps)
        if solver.algorithm.learn is not None:
            solver.misses += falls_short(solver.algorithm.learn, sites)
        solver.begin(sites)
        for group, repeated in _order(chain, place, sites):
            if solver.algorithm.measures and not solver.known(group):
                measure(group, run, repeated=repeated, pairs=pairs)
            for site in group:
                solver.solve(site)
                swaps.put(site)
        if solver.algorithm.learn is not None and not solver.known(sites):
            learn_block(solver.algorithm.learn, chain, place, targets, sites)
            for site in sites:
                solver.settle(site)
                swaps.put(site)
        for batch, given in enumerate(chain.given):
            chain.given[batch] = chain.behind(place, batch, given)
    if solver.algorithm.learn is None:
        for batch, given in enumerate(exact):
            exact[batch] = chain.exact[batch] = chain.behind(place, batch, given)
    chain.exact = exact


def _order(chain: Chain, place: int, sites: Sequence[Site]) -> list[tuple[list[Site], bool]]:
    """The sites as they run, those that share an input together; and whether a group is one that runs again.

    A module that runs several times is alone: what it reads the next time is another tensor.
    """
    by_module = {site.module: site for site in sites}
    groups: list[tuple[Any, list[Site]]] = []
    seen: set[nn.Module] = set()
    again: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in seen:
            again.add(module)
            return
        seen.add(module)
        given = next(iter(in_order(module, args, kwargs)), None)
        if groups and groups[-1][0] is given:
            groups[-1][1].append(by_module[module])
        else:
            groups.append((given, [by_module[module]]))

    with hooked(chain.blocks[place], dict.fromkeys(by_module, note)):
        chain.run(place, 0)
    found: list[tuple[list[Site], bool]] = []
    for _, group in groups:
        once = [site for site in group if site.module not in again]
        found += [(once, False)] if once else []
        found += [([site], True) for site in group if site.module in again]
    # Those that the first batch does not reach may run any number of times for another.
    return found + [([site], True) for site in sites if site.module not in seen]
