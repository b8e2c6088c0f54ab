"""A chain of blocks walked: each solved on what the rounded blocks before it really give.

In: a chain at its first block (`float_run.py`), and what decides (`decide.py`). Out: codes on the anchors of
the blocks' sites; the model itself is as it was.

    block 0, balanced: q, k, v    inputs measured, solved, the rounded weights put in
             o; gate, up; down                    each after what it depends on
    block 0 again, on rounded weights             what block 1 gets; float weights are put back
    block 1 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ...passes.note import annotated
from ..module_scope import Site
from ..swaps import Swaps
from .at_rest import at_rest, hooked, in_order
from .blocks import Chain
from .decide import Decider
from .float_run import within
from .measure import Pairs, measure, once
from .places import Block, Whole, work


def walk(whole: Whole, chain: Chain, decider: Decider) -> None:
    """Its blocks one after the other; then hidden values are let go."""
    if decider.algorithm.together or decider.algorithm.wants_exact:
        chain.exact = list(chain.given)
    with at_rest(whole.model):
        for place, block in enumerate(chain.blocks):
            with at_rest(block):  # each of its runs starts from the same buffers
                _walk_block(whole, chain, place, decider)
    chain.given, chain.exact, chain.calls = [], [], []


def _walk_block(whole: Whole, chain: Chain, place: int, decider: Decider) -> None:
    """Solve the sites of one block, then bring every batch behind it, through its rounded weights."""
    sites = [site for site in whole.sites if within(site.path, chain.paths[place])]
    algorithm = decider.algorithm
    pairs = Pairs() if algorithm.wants_exact else None
    # What the block gives in the float model. Only where learning wants it and solving wants what goes in are
    # both there at once.
    exact = chain.exact if pairs is None else list(chain.exact)
    if algorithm.together:
        for batch, given in enumerate(exact):
            exact[batch] = chain.behind(place, batch, given)
    targets = [one.hidden for one in exact] if algorithm.together else []
    with Swaps() as swaps:

        def run() -> None:
            for batch in range(len(chain.hidden)):
                if pairs is not None:
                    with swaps.lifted(), pairs.first():
                        once(partial(chain.run_exact, place, batch))
                once(partial(chain.run, place, batch))

        at = Block(whole, chain, place, sites, swaps, targets)
        for step in algorithm.at("block before"):
            work(step, at)
        for site in sites:
            if any(note.stored for _, note in annotated(site.gm)):
                swaps.put(site)  # what is decided is behind the codes that these will have
        decider.begin(sites)
        for group, repeated in _order(chain, place, sites):
            if algorithm.measures and not decider.restored(group):
                measure(group, run, repeated=repeated, pairs=pairs)
            for site in group:
                decider.solve(site)
                swaps.put(site)
        if algorithm.together and not decider.restored(sites):
            # A tied weight that another block has decided moves no more.
            own = replace(at, sites=[site for site in sites if site.path not in decider.taken])
            for step in algorithm.at("block after"):
                work(step, own)
            for site in sites:
                decider.settle(site)
                swaps.put(site)
        for batch, given in enumerate(chain.given):
            chain.given[batch] = chain.behind(place, batch, given)
    if not algorithm.together:
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
