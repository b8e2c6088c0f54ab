"""`bf.quantize`: a model in, the same model with codes in place of its weights out.

In: any `nn.Module` and a recipe. Out (module scope, the default): that model, quantized in place, its float
weights freed one by one. Out (program scope): a lowered GraphModule of the whole model, which is left as it
was.

    q = bf.quantize(model, "int4")                                    # in place; q is model
    gm = bf.quantize(model, "int8", scope="program", example_inputs=(x,))

Every check runs before the first write, so that a mistake leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..formats import BitfoldError, Quantized
from ..passes import Pipeline, capture, expression, state
from ..passes.anchors import TARGETS
from ..passes.annotate import Annotate
from ..passes.calibrate import calibrate
from ..passes.fold import Fold
from ..passes.note import annotated
from ..passes.observe import Observe
from ..passes.recipes import Recipe
from ..passes.stages import find_attribute
from .calibration import Batches, observe_modules, record_arguments
from .folded import Canonical, Folded, Steps
from .graph_data import dump, tensor_names
from .install import CANONICAL, Installer, Source, lower_graph, resolve_target
from .memory import release
from .module_scope import Plan, Site, Step, plan
from .parameters import check_parameters, parameter_names, with_all_names
from .report import ATTRIBUTE
from .steps_back import back_from

Scope = Literal["module", "program"]


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
    progress: Step | None = None,
) -> Any:
    """Quantize `model` by `recipe` (a name such as "int4", a format, JSON, or a `Recipe`).

    calibration     batches for recipes that calibrate: each a tensor, a tuple of arguments, or a dict of
    keywords scope           "module": in place, module by module, for any model; "program": one graph of the
    whole model target          where it shall run ("cpu", "reference", ...); by default that of the weights'
    device stored          parameter path -> `Quantized`: codes that a checkpoint came with, taken as they are
    example_inputs  as a batch: needed in program scope, and for modules of unknown kinds dynamic
    program scope: the sizes that vary, as `bf.capture` takes them progress        called with (what, done,
    total)

    Returns the model (module scope) or the lowered GraphModule. Raises BitfoldError, with the model as it
    was, for anything wrong in what was given; and, naming what is folded already, if memory or disk gives out
    midway.
    """
    with torch.inference_mode(False):
        # Codes made in inference mode could never stand beside an adapter that trains.
        return _quantize(model, recipe, calibration, scope, target, stored, example_inputs, dynamic, progress)


def _quantize(
    model: nn.Module,
    recipe: str | Recipe,
    calibration: Iterable[Any] | None,
    scope: Scope,
    target: str | None,
    stored: Mapping[str, Quantized] | None,
    example_inputs: Any,
    dynamic: Any,
    progress: Step | None,
) -> Any:
    wanted = Recipe.parse(recipe)
    check_parameters(model)
    on = resolve_target(target, _device(model))
    batches = Batches(calibration, example_inputs)
    if scope == "program":
        return _program(model, wanted, batches, on, dict(stored or {}), dynamic, progress)
    if scope != "module":
        raise BitfoldError(f"scope is {scope!r}; it may be 'module' (in place) or 'program' (one graph)")
    found = plan(model, wanted, stored=stored or {}, record=_recorder(model, batches), progress=progress)
    _check_found(model, wanted, found)
    if found.calibrated:
        _calibrate(model, found, batches, progress)
    _fold(model, found, on, progress)
    release()
    return model


def _recorder(model: nn.Module, batches: Batches) -> Any:
    batch = batches.example()
    if batch is None:
        return None
    return lambda modules: record_arguments(model, batch, modules)


def _check_found(model: nn.Module, recipe: Recipe, found: Plan) -> None:
    """A recipe that found nothing to do is a mistake, unless an earlier call has done it."""
    if found.sites or not any(not rule.skip for rule in recipe.rules):
        return
    if any(isinstance(module, Folded) for module in model.modules()):
        return
    why = f" (for one: {found.misses[0]})" if found.misses else ""
    raise BitfoldError(
        f"recipe {recipe.name!r} found nothing to quantize in this {type(model).__name__}{why}"
    )


def _calibrate(model: nn.Module, found: Plan, batches: Batches, progress: Step | None) -> None:
    _check_given(next(site.path for site in found.sites if site.calibrated), batches)
    observed = {}
    for site in found.sites:
        if site.calibrated:
            Pipeline([Observe()]).run(site.gm)
            observed[site.module] = site.gm
    _check_some(observe_modules(model, batches, observed, progress))


class _Tied:
    """Codes of tied weights, made once. Keeps nothing of a weight that only one module has."""

    def __init__(self, tied: set[int]) -> None:
        self._tied = tied
        self._codes: dict[tuple[int, str, str], Quantized] = {}

    def folded(self, parameter: Tensor, expression: str, format: str, make: Any) -> Quantized:
        if id(parameter) not in self._tied:
            return make(parameter)  # type: ignore[no-any-return]
        key = (id(parameter), expression, format)
        if key not in self._codes:
            self._codes[key] = make(parameter)
        return self._codes[key]


def _fold(model: nn.Module, found: Plan, target: str, progress: Step | None) -> None:
    names = parameter_names(model)
    store = _Tied({key for key, paths in names.items() if len(paths) > 1})
    installer = Installer(target)
    done: list[str] = []
    sites, total = found.sites, len(found.sites)
    known = (*getattr(model, ATTRIBUTE, ()), *found.misses)
    model.__dict__[ATTRIBUTE] = known
    while sites:
        site = sites.pop(0)
        if progress is not None:
            progress(f"fold {site.path}", len(done), total)
        try:
            _fold_site(site, names, store, installer)
        except (MemoryError, RuntimeError, OSError) as error:
            raise BitfoldError(_midway(site, done, total, error)) from error
        done.append(site.path)
        model.__dict__[ATTRIBUTE] = (*known, *installer.misses)
    if progress is not None:
        progress("folded", total, total)


def _fold_site(site: Site, names: Mapping[int, list[str]], store: _Tied, installer: Installer) -> None:
    sources, dtype = _sources(site, names)
    state(site.gm).store = store
    Pipeline([Fold()]).run(site.gm)
    graph = dump(site.gm)
    tensors = {name: find_attribute(site.gm, name) for name in tensor_names(graph)}
    installer.install(site.path, site.module, graph, tensors, sources, dtype, ranks=site.ranks, gm=site.gm)


def _sources(site: Site, names: Mapping[int, list[str]]) -> tuple[dict[str, Source], torch.dtype]:
    """The parameters of a site that are about to become codes, by their name in the module."""
    sources: dict[str, Source] = {}
    dtype = torch.float32
    for node, note in annotated(site.gm):
        operand = node.args[TARGETS[node.target][2]]
        chain = expression(site.gm, operand)  # type: ignore[arg-type]
        if not note.weight or chain is None:
            continue
        own = chain.path.removeprefix(site.path).strip(".")
        back: Steps | None = back_from(chain, note.anchor)
        sources[own] = Source(tuple(chain.parameter.shape), names[id(chain.parameter)][0], back)
        dtype = chain.parameter.dtype
    return sources, dtype


def _midway(site: Site, done: list[str], total: int, error: BaseException) -> str:
    cause = error.__cause__ or error
    why = ": ".join(part for part in (type(cause).__name__, str(cause).strip().split("\n")[0]) if part)
    so_far = f"{', '.join(done[:3])}{', ...' if len(done) > 3 else ''}" if done else "none"
    return (
        f"folding {site.path} failed ({why}) with {len(done)} of {total} modules folded ({so_far}); those "
        "run on codes, the others as before: remove the cause and call bf.quantize with the same arguments "
        "again, which goes on from there"
    )


def _program(
    model: nn.Module,
    recipe: Recipe,
    batches: Batches,
    target: str,
    stored: dict[str, Quantized],
    dynamic: Any,
    progress: Step | None,
) -> GraphModule:
    example = batches.example()
    if example is None:
        raise BitfoldError(
            "scope='program' captures the whole model; give example_inputs=(...) that it is called with"
        )
    gm = capture(model, example.args, kwargs=example.kwargs, dynamic=dynamic)
    state(gm).stored = with_all_names(stored, model)
    notes = Pipeline([Annotate(recipe=str(recipe))]).run(gm, progress=progress).steps[-1].rewrites
    if notes == 0 and any(not rule.skip for rule in recipe.rules):
        raise BitfoldError(f"recipe {recipe.name!r} found nothing to quantize in this {type(model).__name__}")
    observed = next((note.layer for _, note in annotated(gm) if note.observer), None)
    if observed is not None:
        _check_given(observed, batches)
        Pipeline([Observe()]).run(gm, progress=progress)
        _check_some(calibrate(gm, batches.raw()))
    Pipeline([Fold()]).run(gm, progress=progress)
    gm.meta[CANONICAL] = Canonical(dump(gm), {})
    return lower_graph(gm, target)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_given(layer: str, batches: Batches) -> None:
    if not batches.given:
        raise BitfoldError(
            f"layer {layer} takes activations of calibrated range; give calibration=[batches], or use a "
            "recipe whose activations are quantized dynamically"
        )


def _check_some(batches: int) -> None:
    if batches == 0:
        raise BitfoldError("calibration has no batches; give at least one")
