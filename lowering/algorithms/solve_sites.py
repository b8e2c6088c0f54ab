"""Algorithms over a whole model: block by block, each block seeing what the rounded ones before it really
give.

In: a plan (`module_scope.py`), an algorithm and calibration batches. Out: codes on the anchors
of the plan's graphs, where `fold` finds them; the model itself is as it was.

    solve_sites(model, found, algorithm_of("rotate,awq,clip,gptq,tune"), batches)
        rotate                                        the whole model, once
        every batch once through the float model      what each block is called with, and that all is well
        each block in turn (walk.py)                  balanced, measured, solved (decide.py), learned
        layers outside of blocks                      solved as they were measured in the float run
        tune                                          the whole model, once

So beside the model and the codes there are one block's rounded weights, the second moments of layers that
share an input, and one hidden value a batch. An encoder and a decoder are walked one after the other, each
from what the float model gives it. Layers outside the blocks, and all layers of a model that is no chain of
blocks, are measured in the float run and solved by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...formats import BitfoldError
from ...passes import Miss, MissRecord
from ...passes.algorithms.on_model import OnModel
from ...passes.core import Progress
from ...passes.note import annotated
from ...passes.observing.batch import Batch
from ..module_scope import Plan
from ..parameters import parameter_names
from ..swaps import Swaps, check_changes
from . import balance_block, correct_biases, learn_block, rotate_model, tune_model  # what `work` does
from .algorithm import Algorithm
from .at_rest import at_rest
from .blocks import without_cache
from .decide import Decider
from .float_run import measure_in_floats, portions, recorded
from .places import Whole, work
from .results import Results
from .walk import walk

BUILT_IN = (balance_block, correct_biases, learn_block, rotate_model, tune_model)
"""Modules that register what the passes of this package do."""


@torch.no_grad()
def solve_sites(
    model: nn.Module,
    found: Plan,
    algorithm: Algorithm,
    batches: Sequence[Batch],
    *,
    results: Results | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Decide the codes of every weight of the plan, and return new values for parameters that take none.
    Raises BitfoldError, before long work begins, for batches that do not go through the model, give NaN, or
    miss a layer."""
    tied = frozenset(key for key, paths in parameter_names(model).items() if len(paths) > 1)
    with without_cache(model), Swaps() as swaps:
        whole = Whole(model, found, batches, swaps, progress)
        decider = Decider(whole, algorithm, results, tied=tied)
        if not algorithm.needs_data:
            for site in whole.sites:
                decider.solve(site)
            return {}
        _check(whole, algorithm, results)
        for step in algorithm.at("model before"):
            with at_rest(model):
                work(step, whole)
            check_changes(model, whole.changes, found)
        _solve(whole, decider)
        check_changes(model, whole.changes, found)
    with without_cache(model), at_rest(model):
        for step in algorithm.at("model after"):
            work(step, whole)
            check_changes(model, whole.changes, found)
    return whole.changes


def _check(whole: Whole, algorithm: Algorithm, results: Results | None) -> None:
    """Raises BitfoldError for what cannot go together."""
    if not whole.batches:
        raise BitfoldError(f"{algorithm} measures what goes into each layer; give calibration=[batches]")
    if algorithm.wants_floats and algorithm.changes_weights and results is not None:
        name = algorithm.at("model after")[0].name
        raise BitfoldError(
            f"{name} compares with float weights that other passes have changed, which resume does not keep; "
            "leave one of the two out"
        )
    for step in algorithm.steps:
        if isinstance(step, OnModel) and work.dispatch(type(step)) is work.dispatch(object):
            work(step, whole)  # says that nothing is registered
    for step in algorithm.at("block before")[:1]:
        for site in whole.sites:
            if any(note.output and note.observer for _, note in annotated(site.gm)):
                raise BitfoldError(
                    f"layer {site.path} has an output of calibrated range, which {step.name} would change "
                    "afterwards; leave the format of outputs to the layers that read them"
                )


def _solve(whole: Whole, decider: Decider) -> None:
    """Every site solved, block by block where the model is a chain of them."""
    algorithm, name = decider.algorithm, decider.algorithm.on_blocks()
    chains, rest, dropped = recorded(whole.model, whole.sites, whole.batches, algorithm.measures)
    if isinstance(chains, Miss):
        if name:
            raise BitfoldError(f"{name} works on a chain of blocks, and this model is none: {chains.reason}")
        reason = f"{chains.reason}, so each layer is measured in the float model"
        whole.found.misses.append(MissRecord("", "", "", str(algorithm), reason))
        chains = []
    for path, why in dropped.items():
        whole.miss(path, str(algorithm), f"{why}, so its layers are measured in the float model")
    for chain in chains:
        walk(whole, chain, decider)
    blocks = " and ".join(f"{chain.paths[0]} to {chain.paths[-1]}" for chain in chains)
    for number, portion in enumerate(portions(rest)):
        if number and algorithm.measures and not decider.restored(portion):
            measure_in_floats(whole.model, portion, whole.batches)
        for site in portion:
            if name and chains:
                reason = f"{name} works on the blocks {blocks}, and this is outside them"
                whole.miss(site.path, str(algorithm), reason)
            decider.solve(site)
            decider.settle(site)
