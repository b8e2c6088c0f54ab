"""`bf.prepare_qat`: a model in, the same model in a form that trains on rounded numbers out.

In: any `nn.Module`, a recipe, and options. Out (module scope): that model, prepared in place; its weights are
the same float parameters, so that any optimizer and any training loop goes on with them. Out (program
scope): a graph of the whole model over the model's own parameters, with `.train()` and `.eval()`.

    bf.prepare_qat(model, "int4[g32]"); train(model); bf.convert(model)

Every check runs before the first write, so that a mistake leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...formats import BitfoldError
from ...passes import MissRecord, Pipeline
from ...passes.core import Progress
from ...passes.observing.observe import Observe
from ...passes.recipes import Recipe
from ..algorithms.calibration import Batches
from ..folded import Folded
from ..given_model import module_of
from ..module_scope import Call, Plan, plan
from ..parameters import check_parameters
from ..quantize import Scope, calibrate_sites, check_found, check_scope, recorder
from ..report import ATTRIBUTE
from ..tracing import TRACING
from .distill import Distill, Teacher, dismiss, teach, teacher_of
from .following_norms import following_norms
from .module_graphs import Order, freezing, no_range, train_site
from .options import Qat
from .preparation import PROGRAM
from .prepared import Prepared
from .prepared_program import prepare_program
from .states import check_state, of_model
from .unprepared import unprepared
from .write_modules import Writer


@torch.inference_mode(False)  # scales that are made in it could never be trained
def prepare_qat(
    model: nn.Module,
    recipe: str | Recipe,
    options: Qat | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    scope: Scope = "module",
    state: Mapping[str, Any] | None = None,
    distill: Distill | None = None,
    example_inputs: Any = None,
    dynamic: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Prepare `model` for training under `recipe`, which means what it means to `bf.quantize`.

    - options: gradients and schedule, a `Qat`; by default straight-through, clipped for activations
    - calibration: batches from which the ranges of calibrated activations start; needed by recipes that have
      some, unless `Qat(observe=..)` finds them in training, or `state` brings them
    - scope, example_inputs, dynamic, progress: as for `bf.quantize`
    - distill: keep a frozen copy of the float model, for `bf.distillation`
    - state: a state dict of this model prepared in the same way, which is loaded; training goes on from there

    A model that is prepared already goes on in the formats of the new recipe (fewer bits, say), with the same
    parameters: its learned scales begin anew, as the same objects where their shapes are the same, so that an
    optimizer keeps them; its ranges and its step counter go on. A program stays in its formats: the model
    that it was captured from, whose weights it trained, gives another one.

    Returns the model, or the program. Raises BitfoldError, with the model as it was, for anything wrong in
    what was given.
    """
    given, model = model, module_of(model, "bf.prepare_qat")
    how = Qat() if options is None else options
    if not isinstance(how, Qat):
        raise BitfoldError(f"options is a bf.Qat, such as bf.Qat(weight='lsq'), not {type(how).__name__}")
    if state is not None and not isinstance(state, Mapping):
        raise BitfoldError(
            f"state is a state dict, as torch.load(path) gives it, not a {type(state).__name__}"
        )
    with TRACING:
        wanted = Recipe.parse(recipe)
        check_scope(model, scope)
        _check_model(model)
        check_parameters(model)
        batches = Batches(calibration, example_inputs)
        if scope == "program":
            if distill is not None:
                raise BitfoldError(
                    "distill is for scope='module'; in a program add the loss by bf.Distill().of"
                )
            return prepare_program(
                model, wanted, how, batches, dynamic=dynamic, state=state, progress=progress
            )
        if dynamic is not None:
            raise BitfoldError(
                "dynamic is for scope='program'; a module prepared alone takes any shape; leave it out"
            )
        with unprepared(model) as earlier:
            # A copy of the model as it is here, with original modules.
            teacher = Teacher(model, distill) if distill is not None else None
            calls: dict[nn.Module, Call] = {}
            record = _remembering(model, batches, calls)
            found = plan(model, wanted, stored={}, record=record, progress=progress)
            _leave_read(found)
            check_found(model, wanted, found)
            taught_by = teacher or teacher_of(model)
            order = Order(
                str(wanted),
                how,
                calls=calls,
                earlier=earlier.extra,
                loaded=state is not None,
                tables=frozenset(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)),
                teacher=taught_by.mark if taught_by is not None else "",
            )
            _observe(model, found, how, batches, order.ranged, progress)
            norms, misses = following_norms(model, found.sites) if how.fold_norm else ({}, [])
            shared: dict[Hashable, nn.Parameter] = {}
            for site in found.sites:
                misses += train_site(site, order, norms, shared)
            alone, moving = freezing(model, norms, how)
            found.misses += misses + moving
            writer = Writer(order, norms)
            try:
                for site in found.sites:
                    writer.write(site)
                for norm, gm in alone:
                    writer.write_freezing(norm, gm)
                if state is not None:
                    state = of_model(model, state)
                    check_state(model, state)
            except BaseException:
                writer.take_back()
                raise
        _call_every_layer(model)
        model.__dict__[ATTRIBUTE] = tuple(found.misses)
        if teacher is not None:
            dismiss(model)
            teach(model, teacher)
        if state is not None:
            model.load_state_dict(dict(state))
        return given


def _check_model(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, Folded):
            raise BitfoldError(
                f"layer {path or '(the model)'} is quantized already, and codes do not train; prepare the "
                "model as it was before"
            )
        if isinstance(module, GraphModule) and PROGRAM in module.meta:
            raise BitfoldError(
                f"{path or 'this model'} is a program that trains already, in the formats of its recipe; "
                "prepare the model that it came from once more, whose parameters it trains"
            )


def _leave_read(found: Plan) -> None:
    """Report layers whose weight is read past their forward: there it would be the float one in training, and
    another when it is folded."""
    for site in list(found.sites):
        if isinstance(site.module, NonDynamicallyQuantizableLinear):
            found.sites.remove(site)
            reason = "its owner, an nn.MultiheadAttention, reads the weight without calling it"
            found.misses.append(MissRecord(site.path, site.path, "", "training", reason))


def _call_every_layer(model: nn.Module) -> None:
    """Let nn.TransformerEncoderLayer call its linears in evaluation too: its fast path reads their weights
    instead, and would see the float ones."""
    for module in model.modules():
        rounded = any(isinstance(child, Prepared) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and rounded:
            module.activation_relu_or_gelu = 0  # what the fast path asks for first


def _remembering(model: nn.Module, batches: Batches, calls: dict[nn.Module, Call]) -> Any:
    """The recorder of `bf.quantize`, and what it recorded."""
    record = recorder(model, batches)
    if record is None:
        return None

    def remember(modules: Iterable[nn.Module]) -> Mapping[nn.Module, Call]:
        calls.update(record(modules))
        return calls

    return remember


def _observe(
    model: nn.Module, found: Plan, how: Qat, batches: Batches, ranged: bool, progress: Progress | None
) -> None:
    """Ranges from calibration, where there is data; else observers that have seen nothing."""
    if not found.calibrated:
        return
    if batches.given:
        calibrate_sites(model, found, batches, progress)
        return
    if not how.observe and not ranged:
        layer = next(site.path for site in found.sites if site.calibrated)
        raise no_range(layer)
    if how.activation_learns and not ranged:
        layer = next(site.path for site in found.sites if site.calibrated)
        raise BitfoldError(
            f"layer {layer} learns the range of its activations, which begins at a calibrated one; give "
            "calibration=[batches]"
        )
    for site in found.sites:
        if site.calibrated:
            Pipeline([Observe()]).run(site.gm, record=False)
