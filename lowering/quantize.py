"""`bf.quantize`: a model in, the same model with codes in place of its weights out.

In: any `nn.Module` and a recipe. Out (module scope, the default): that model, quantized in place, its float
weights freed one by one. Out (program scope): a lowered GraphModule of the whole model, which itself is left
as it was.

    q = bf.quantize(model, "int4")                                    # in place; q is model
    gm = bf.quantize(model, "int8", scope="program", example_inputs=(x,))

Every check runs before the first write, so that a mistake leaves the model as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..formats import BitfoldError, Quantized
from ..passes import Pipeline
from ..passes.core import Progress
from ..passes.observing.batch import Batch
from ..passes.observing.calibrate import NO_BATCHES
from ..passes.observing.observe import Observe
from ..passes.recipes import Recipe
from ..passes.training.fake_quantize import check_observers
from .algorithms.algorithm import Algorithm, algorithm_of
from .algorithms.calibration import Batches, observe_modules, record_arguments
from .algorithms.results import Results, fingerprint
from .algorithms.solve_sites import solve_sites
from .fold_sites import fold_sites
from .folded import Folded
from .given_model import module_of
from .install import CANONICAL, resolve_target
from .memory import held, release
from .module_scope import Plan, Record, plan
from .parameters import check_parameters
from .program_scope import quantize_program
from .swaps import as_decided, changed
from .tracing import TRACING

Scope = Literal["module", "program"]


@torch.inference_mode(False)  # codes made in inference mode could never stand beside an adapter that trains
def quantize(
    model: nn.Module,
    recipe: str | Recipe,
    *,
    calibration: Iterable[Any] | None = None,
    scope: Scope = "module",
    target: str | None = None,
    stored: Mapping[str, Quantized] | None = None,
    example_inputs: Any = None,
    dynamic: Any = None,
    progress: Progress | None = None,
    algorithm: str | Pipeline | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Any:
    """Quantize `model` by `recipe` (a name such as "int4", a format, JSON, or a `Recipe`).

    - calibration: batches for recipes that calibrate, each a tensor, a tuple of arguments, or a dict
    - scope: "module", in place, module by module, for any model; "program", one graph of the whole model
    - target: where it shall run ("cpu", "reference", ...); by default that of the weights' device
    - stored: parameter path -> `Quantized`, codes that a checkpoint came with, to be taken as they are
    - example_inputs: as one batch; for the program scope, and for modules of kinds that are not known
    - dynamic: program scope, the sizes that vary, as `bf.capture` takes them
    - progress: called with (what, done, total)
    - algorithm: passes that decide the codes, such as "clip,gptq" (docs/notes/ptq.md); by default each number
      is rounded to the nearest. Most measure what goes into each layer, and so want `calibration`
    - resume: a folder for what the algorithm has found, layer by layer; a run that was interrupted goes on

    Returns the model (module scope) or the lowered GraphModule, which stays in the mode (train or eval), in
    the dtype and over the unquantized parameters of the model as it is now.

    Raises BitfoldError, with the model as it was, for anything wrong in what was given; and, naming what is
    folded already, if memory or disk gives out midway.
    """
    given, model = model, module_of(model, "bf.quantize")
    prepared = [path for path, one in model.named_modules() if getattr(one, "is_prepared", False)]
    if prepared:
        raise BitfoldError(
            f"{prepared[0] or 'this model'} is prepared for training; call bf.convert, which quantizes it as "
            "it was trained, or give the model as it was before"
        )
    with TRACING:
        wanted = Recipe.parse(recipe)
        check_scope(model, scope)
        check_parameters(model)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        on = resolve_target(target, device)
        batches = Batches(calibration, example_inputs)
        codes = stored or {}
        steps = None if algorithm is None else algorithm_of(algorithm)
        if resume is not None and scope == "program":
            raise BitfoldError("resume keeps what is found layer by layer; it goes with scope='module' only")
        if resume is not None and steps is None:
            raise BitfoldError("resume keeps what an algorithm finds; give algorithm= too")
        if scope == "program":
            return quantize_program(
                model, wanted, batches, on, stored=codes, dynamic=dynamic, progress=progress, steps=steps
            )
        found = plan(model, wanted, stored=codes, record=recorder(model, batches), progress=progress)
        check_found(model, wanted, found)
        if found.calibrated:  # before an algorithm begins, whose work would be lost
            batches.check_given(next(site.path for site in found.sites if site.calibrated))
        data: Iterable[Batch] = batches
        changes: dict[str, Tensor] = {}
        if steps is not None:
            data = list(batches)  # an algorithm goes over them again and again
            changes = _solve(model, wanted, found, steps, data, resume, progress)
        if found.calibrated:
            with as_decided(model, changes, found):
                calibrate_sites(model, found, data, progress)
        before = held(model)
        with changed(model, changes, found):
            fold_sites(model, found, on, progress)
        _untied(model)
        release(before - held(model))
        return given


def _untied(model: nn.Module) -> None:
    """transformers ties a head to its embedding anew when it saves or loads, if its configuration says so."""
    given: Any = model
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    head, table = given.get_output_embeddings(), given.get_input_embeddings()
    weights = [getattr(one, "_parameters", {}).get("weight") for one in (head, table)]
    if None not in weights and weights[0] is not weights[1]:
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def check_scope(model: nn.Module, scope: str) -> None:
    if scope not in ("module", "program"):
        raise BitfoldError(f"scope is {scope!r}; it may be 'module' (in place) or 'program' (one graph)")
    if isinstance(model, GraphModule) and CANONICAL in model.meta:
        raise BitfoldError(
            "this program is quantized already, and from codes there is no way to other codes; quantize the "
            "model that it was captured from"
        )


def recorder(model: nn.Module, batches: Batches) -> Record | None:
    batch = batches.example()
    if batch is None:
        return None
    return lambda modules: record_arguments(model, batch, modules)


def check_found(model: nn.Module, recipe: Recipe, found: Plan) -> None:
    """A recipe that found nothing to do is a mistake, unless an earlier call has done it."""
    if found.sites or not any(not rule.skip for rule in recipe.rules):
        return
    if any(isinstance(module, Folded) for module in model.modules()):
        return
    if isinstance(model, GraphModule):
        raise BitfoldError(
            f"recipe {recipe.name!r} found no module to quantize in this GraphModule: the layers of a "
            "captured graph are operators; call bf.quantize(graph, recipe, scope='program', "
            "example_inputs=...), or give it the model before it is captured"
        )
    why = f" (for one: {found.misses[0]})" if found.misses else ""
    raise BitfoldError(
        f"recipe {recipe.name!r} found nothing to quantize in this {type(model).__name__}{why}"
    )


def _solve(
    model: nn.Module,
    recipe: Recipe,
    found: Plan,
    steps: Algorithm,
    batches: list[Batch],
    resume: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> dict[str, Tensor]:
    results = None
    if resume is not None:
        results = Results(resume, fingerprint(model, (json.dumps(recipe.to_dict()), str(steps)), batches))
    return solve_sites(model, found, steps, batches, results=results, progress=progress)


def calibrate_sites(
    model: nn.Module, found: Plan, batches: Iterable[Batch], progress: Progress | None
) -> None:
    observed = {}
    for site in found.sites:
        if site.calibrated:
            Pipeline([Observe()]).run(site.gm, record=False)
            observed[site.module] = site.gm
    if observe_modules(model, batches, observed, progress) == 0:
        raise BitfoldError(NO_BATCHES)
    for site in found.sites:
        try:
            check_observers(site.gm)
        except BitfoldError as error:
            raise BitfoldError(
                f"layer {site.path} takes activations of calibrated range and no calibration batch reaches "
                "it; give batches that do, or let a rule of the recipe skip it"
            ) from error
