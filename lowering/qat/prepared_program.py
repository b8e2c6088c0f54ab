"""A whole model as one graph that trains on rounded numbers.

In: a model and example inputs. Out: a GraphModule over the model's own parameters, called as the model is,
whose `.train()` and `.eval()` flip dropout, batch norm and the rounding by the pass `train_mode`. It is
captured in evaluation; a model with attention once more in training, for the dropout that only that mode has.

    gm = bf.prepare_qat(model, "int8", scope="program", example_inputs=(x,))
    gm.train(); train(gm); q = bf.convert(gm)

Batch norm after a convolution is folded the way that trains (`passes/training/batch_norm.py`) unless the
options say otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...formats import BitfoldError
from ...passes import CaptureError, Fold, Pass, Pipeline, capture
from ...passes import state as state_of
from ...passes.annotate import Annotate
from ...passes.core import Progress
from ...passes.edges import first_calibrated
from ...passes.observing.batch import Batch
from ...passes.observing.calibrate import calibrate
from ...passes.observing.observe import Observe
from ...passes.recipes import Recipe
from ...passes.training.batch_norm import SettleBatchNorm
from ...passes.training.freeze_norm import FreezeNorm, SettleFrozenNorm
from ...passes.training.mode import TrainMode, remember_dropout, without_dropout
from ...passes.training.quantizers import ranges
from ...passes.training.settle_quantizers import SettleQuantizers
from ...passes.training.share_learned import share_learned
from ..algorithms.calibration import Batches
from ..files.graph_data import dump
from ..folded_weight import Canonical
from ..install import CANONICAL, lower_graph
from ..kv_cache.quantize import speaks_of_caches
from ..program import as_program, own_tensors
from .caches import SettleCache, TrainCache, has_attention
from .kernels import check_kernels
from .options import Qat
from .passes_of import norm_pass, train_pass
from .preparation import PROGRAM, PreparedProgram, program_of
from .prepared import Prepared
from .states import check_state, of_model
from .trained_as import as_bytes, check_trained_as, trained_as


class _Training(GraphModule):
    """What is added to the class of a graph: modes that torch.export bakes in."""

    def train(self, mode: bool = True) -> Any:
        # What the graph does counts, not the flag, which others set too (torch.compile's wrapper, say).
        self.training = mode
        if TrainMode(on=mode).apply(self):
            self.recompile()
        return self

    def eval(self) -> Any:
        return self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            dtype = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype
            if dtype != tensor.dtype:
                raise BitfoldError(
                    f"a program keeps the dtypes that it was captured in, and {name} would become {dtype}; "
                    "convert the model to that before bf.prepare_qat"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> Any:
        return as_bytes(program_of(self).trains)

    def set_extra_state(self, state: Any) -> None:
        check_trained_as(program_of(self).trains, state, "")

    def __deepcopy__(self, memo: Any) -> GraphModule:
        return _of_class(super().__deepcopy__(memo), _Training, self.training)


def _of_class(gm: GraphModule, base: type[GraphModule], training: bool) -> GraphModule:
    """`gm` with another class of its own, on which a GraphModule keeps its code."""
    for method in ("train", "eval"):  # set on the instance by torch.export, where they raise
        gm.__dict__.pop(method, None)
    gm.training = training
    gm.__class__ = type("GraphModuleImpl", (base,), {})
    gm.recompile()
    return gm


def prepare_program(
    model: nn.Module,
    recipe: Recipe,
    how: Qat,
    batches: Batches,
    *,
    dynamic: Any = None,
    state: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> GraphModule:
    """Capture, annotate, calibrate if the recipe asks for it, and make the graph one that trains."""
    example = batches.example()
    if example is None:
        raise BitfoldError(
            "scope='program' captures the whole model; give example_inputs=(...) that it is called with"
        )
    _check_momentum(model)
    rounded = next((path for path, module in model.named_modules() if isinstance(module, Prepared)), None)
    if rounded is not None:
        raise BitfoldError(
            f"layer {rounded or '(the model)'} is prepared already, with scope='module'; prepare it there "
            "once more, or give a program the model as it was before, with the trained weights"
        )
    training = model.training
    gm = _captured(model, example, dynamic, training=False)
    try:
        remember_dropout(gm, _captured(model, example, dynamic, training=True))
    except CaptureError as error:
        without_dropout(gm, f"in training mode {error}")
    own = {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}
    notes = Pipeline([Annotate(recipe=str(recipe))]).run(gm, progress=progress).steps[-1].rewrites
    cached = speaks_of_caches(recipe) and has_attention(gm)
    if not notes and not cached:
        raise BitfoldError(f"recipe {recipe.name!r} found nothing to quantize in this {type(model).__name__}")
    observed = first_calibrated(gm)
    if observed is not None:
        if state is None and (how.activation_learns or not how.observe):
            batches.check_given(observed)
        Pipeline([Observe()]).run(gm, progress=progress)
        if batches.given:
            calibrate(gm, batches, progress)
    Pipeline([train_pass(how, loaded=state is not None)]).run(gm, progress=progress)
    if how.fold_norm:
        Pipeline([norm_pass(how, loaded=state is not None)]).run(gm, progress=progress)
    if how.freeze_norm is not None:
        Pipeline([FreezeNorm(step=how.freeze_norm)]).run(gm, progress=progress)
    if cached:
        caches = TrainCache(recipe=str(recipe), gradient=how.activation, warmup=how.warmup)
        if not Pipeline([caches]).run(gm, progress=progress).steps[-1].rewrites + notes:
            raise BitfoldError(f"recipe {recipe.name!r} found no cache and no attention that it can round")
    state_of(gm).misses += check_kernels(gm)
    share_learned(gm, {})
    held = (*gm.named_parameters(), *gm.named_buffers())
    gm.meta[PROGRAM] = PreparedProgram(
        how,
        extra=tuple(name for name, _ in held if name not in own),
        ranges=ranges(gm),
        caches=str(recipe) if cached else "",
        trains=trained_as(gm, how),
    )
    made = _of_class(gm, _Training, False)
    if state is not None:
        state = of_model(made, state)
        check_trained_as(program_of(gm).trains, state.get("_extra_state"), "")
        check_state(made, state)
        made.load_state_dict(dict(state))
    return made.train(training)


def _check_momentum(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase) or module.running_mean is None:
            continue
        if module.momentum is None:
            raise BitfoldError(
                f"batch norm {path} averages over all batches (momentum=None), which a graph does not count; "
                "give it a momentum, or take scope='module'"
            )


def _captured(model: nn.Module, example: Batch, dynamic: Any, *, training: bool) -> GraphModule:
    """The model as a graph in one mode; its own modes stay as they are."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        return capture(model, example.args, kwargs=example.kwargs, dynamic=dynamic)
    finally:
        for module, mode in modes.items():
            module.training = mode


def convert_program(gm: GraphModule, target: str, progress: Progress | None) -> GraphModule:
    """A lowered program from a prepared one, which is left as it was."""
    if PROGRAM not in gm.meta:
        raise BitfoldError(
            f"nothing in this {type(gm).__name__} is prepared; call bf.prepare_qat(scope='program') first"
        )
    made = copy.deepcopy(gm)
    made.eval()
    _of_class(made, GraphModule, False)
    caches = program_of(gm).caches
    settled: list[Pass] = [SettleCache(recipe=caches)] if caches else []
    settled += [SettleBatchNorm(), SettleFrozenNorm(), SettleQuantizers(), Fold()]
    Pipeline(settled).run(made, progress=progress)
    made.meta[CANONICAL] = Canonical(dump(made), {})
    lowered = lower_graph(made, target)
    own_tensors(lowered, gm)
    return as_program(lowered)
