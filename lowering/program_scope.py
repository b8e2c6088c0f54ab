"""Program scope: the whole model as one graph, folded and lowered; the model itself is only read.

In: a model and example inputs. Out: a lowered GraphModule that is called as the model is, and that `bf.save`
takes; what is not quantized shares the model's memory, buffers excepted.

    quantize_program(model, int8, batches, "cpu", dynamic="batch")
    ->  GraphModule: linear(x, weight)  became  cpu_linear(x, [weight_codes, weight_scales], "int8", ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..formats import BitfoldError, Quantized
from ..passes import Pipeline, capture, state
from ..passes.annotate import Annotate
from ..passes.core import Progress
from ..passes.edges import first_calibrated
from ..passes.fold import Fold
from ..passes.observing.batch import Batch
from ..passes.observing.calibrate import calibrate, flat_arguments
from ..passes.observing.observe import Observe
from ..passes.observing.share import Share
from ..passes.recipes import Recipe
from ..passes.training.mode import evaluating
from .algorithms.algorithm import Algorithm
from .algorithms.buffers import Buffers
from .algorithms.calibration import Batches
from .algorithms.enough_data import measured, warn_of_few
from .algorithms.measure import Gatherer, linears
from .files.graph_data import dump
from .folded_weight import Canonical
from .install import CANONICAL, lower_graph
from .kv_cache.quantize import QuantizeCache, speaks_of_caches
from .parameters import with_all_names
from .program import as_program, own_tensors


def quantize_program(
    model: nn.Module,
    recipe: Recipe,
    batches: Batches,
    target: str,
    *,
    stored: Mapping[str, Quantized],
    dynamic: Any = None,
    progress: Progress | None = None,
    steps: Algorithm | None = None,
) -> GraphModule:
    """Capture, annotate, calibrate if the recipe asks for it, fold and lower. Mistakes are BitfoldErrors."""
    example = batches.example()
    if example is None:
        raise BitfoldError(
            "scope='program' captures the whole model; give example_inputs=(...) that it is called with"
        )
    gm = capture(model, example.args, kwargs=example.kwargs, dynamic=dynamic)
    state(gm).stored = with_all_names(stored, model)
    caches = 0
    if speaks_of_caches(recipe):
        caches = (
            Pipeline([QuantizeCache(recipe=str(recipe))])
            .run(gm, record=False, progress=progress)
            .steps[-1]
            .rewrites
        )
    notes = (
        Pipeline([Annotate(recipe=str(recipe))]).run(gm, record=False, progress=progress).steps[-1].rewrites
    )
    if notes + caches == 0 and any(not rule.skip for rule in recipe.rules):
        raise BitfoldError(f"recipe {recipe.name!r} found nothing to quantize in this {type(model).__name__}")
    data: list[Batch] = list(batches) if steps is not None else []
    with _measured(gm, model):
        if steps is not None:
            _solve(gm, steps, data, progress)
        observed = first_calibrated(gm)
        if observed is not None:
            batches.check_given(observed)
            Pipeline([Observe(), Share()]).run(gm, record=False, progress=progress)
            calibrate(gm, data if steps is not None else batches, progress)
    Pipeline([Fold()]).run(gm, record=False, progress=progress)
    gm.meta[CANONICAL] = Canonical(dump(gm), {})
    lowered = lower_graph(gm, target)
    own_tensors(lowered, model)
    return as_program(lowered)


@contextmanager
def _measured(gm: GraphModule, model: nn.Module) -> Iterator[None]:
    """In evaluation, and what the graph writes into buffers, which are the model's own, put back."""
    kept = [Buffers(gm), Buffers(model)]
    try:
        with evaluating(gm):
            yield
    finally:
        with torch.no_grad():
            for one in kept:
                one.back()


@torch.no_grad()
def _solve(gm: GraphModule, steps: Algorithm, batches: list[Batch], progress: Progress | None) -> None:
    """All layers measured in the float graph, then solved one after the other. (The module scope holds one
    block's statistics at a time, and measures each block behind the rounded ones.)"""
    name = steps.on_whole() or steps.on_blocks()
    if name:
        raise BitfoldError(f"{name} works on the modules of a model; use scope='module'")
    if steps.needs_data:
        if not batches:
            raise BitfoldError(f"{steps} measures what goes into each layer; give calibration=[batches]")
        run = Gatherer(gm, [node for node, _ in linears(gm)], type(gm).__name__)
        for index, batch in enumerate(batches):
            if progress is not None:
                progress(f"measure batch {index}", index, len(batches))
            run.run(*flat_arguments(gm, batch))
        if steps.measures:
            warn_of_few(measured(gm))
    steps.solve.run(gm, progress=progress)
