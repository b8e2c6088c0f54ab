"""Which modules of a model are quantized one by one, each as an annotated graph: the plan, before any write.

In: a model and a recipe. Out: a `Site` for each module to fold, with its captured and annotated graph, and
what was asked for in vain. Everything that may be the user's mistake is found here.

    plan(llama, int4)  ->  Site("model.layers.0.self_attn.q_proj", nn.Linear, graph: linear(x, weight)), ...

The module is the smallest one that owns a weight and traces alone. Kinds with known arguments (linear,
convolution, embedding) are traced from their sizes; others with the arguments that they get when the model
runs on an example. What such a forward reads of plain Python attributes (a number, a flag) is frozen as it is
then; one that reads `self.training` is left as it was and reported.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..formats import BitfoldError, Quantized, nearest
from ..passes import Miss, MissRecord, Pipeline, capture_module, example_for, joints, rules, state
from ..passes.anchors import anchors
from ..passes.annotate import Annotate
from ..passes.core import Progress
from ..passes.joints import speaks_of_joints
from ..passes.note import annotated
from ..passes.recipes import Recipe
from ..passes.scopes.module import is_stock
from .folded import Folded
from .folded_again import folded_sites
from .install import Sources
from .kv_cache.quantize import MODULE, speaks_of_caches
from .parameters import with_all_names

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a call."""

Record = Callable[[Iterable[nn.Module]], Mapping[nn.Module, Call]]
"""Runs the model on example data: the calls that the given modules got."""


@dataclass
class Site:
    """One module that will be folded, and its graph.

    `ranks`: the number of dimensions of each input that the graph holds for; None if it holds for any.
    `columns`: where each column of the parameter lies among those of the codes; None if they lie alike.
    `sources`: what becomes codes, where the graph that is folded does not show it any more.
    """

    path: str
    module: nn.Module
    gm: GraphModule
    ranks: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None
    sources: Sources | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the range of its activations is found on data."""
        return any(note.observer for _, note in annotated(self.gm))


@dataclass
class Plan:
    """All sites of a model, and the requests that were not met."""

    sites: list[Site] = field(default_factory=list)
    misses: list[MissRecord] = field(default_factory=list)

    @property
    def calibrated(self) -> bool:
        """Whether some layer's ranges are found on data."""
        return any(site.calibrated for site in self.sites)


def plan(
    model: nn.Module,
    recipe: Recipe,
    *,
    stored: Mapping[str, Quantized],
    record: Record | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Capture and annotate each module that the recipe means. Raises BitfoldError with nothing written."""
    codes = with_all_names(stored, model)
    owners = _owners(model)
    unknown = [module for module in owners.values() if not is_stock(module) and not is_parametrized(module)]
    recorded = record(unknown) if record is not None and unknown else {}
    tracer = _Tracer(recorded)
    heads = list(_tied_heads(owners))
    annotate = Pipeline([Annotate(recipe=str(recipe), heads=" ".join(heads))])
    found = Plan()
    known = list(folded_sites(model, recipe))
    named = any(rule.match != "*" for rule in recipe.rules)
    for done, (path, module) in enumerate(owners.items()):
        if progress is not None:
            progress(f"check {path}", done, len(owners))
        site = tracer.site(path, module)
        if isinstance(site, Miss):
            if recipe.rules:
                found.misses.append(MissRecord(path, path, "", recipe.name, site.reason))
            known += [rules.Site((path,), op, 0, 0, 0) for op in rules.OPS]
            continue
        known += [anchor.site for anchor in anchors(site.gm, heads)] if named else []
        state(site.gm).stored = codes
        found.misses += annotate.run(site.gm, record=False).misses
        if any(True for _ in annotated(site.gm)):
            found.sites.append(site)
    found.misses += _split_ties(found.sites)
    found.misses += _unmatched(recipe, known)
    if speaks_of_joints(recipe):
        found.misses.append(MissRecord("", "", "", recipe.name, joints.MODULE))
    if speaks_of_caches(recipe):
        found.misses.append(MissRecord("", "", "", recipe.name, MODULE))
    return found


def _unmatched(recipe: Recipe, known: list[rules.Site]) -> Iterator[MissRecord]:
    """Rules that name a layer which the whole model does not have: a slip of the pen."""
    for rule in recipe.unmatched(known):
        hint = nearest(rule.match, [path for site in known for path in site.paths])
        yield MissRecord("", "", "", str(rule), f"no layer matches this rule{hint}")


def site_of(
    path: str, module: nn.Module, call: Call | None = None, *, cache: dict[Any, Any] | None = None
) -> Site | Miss:
    """One module traced alone, not annotated; `call`: its arguments, for kinds that are not known; `cache`:
    one for all modules of a model, so that each kind is traced once."""
    tracer = _Tracer({} if call is None else {module: call}, cache)
    return tracer.site(path, module)


class _Tracer:
    """Traces modules alone, each kind once."""

    def __init__(self, recorded: Mapping[nn.Module, Call], cache: dict[Any, Any] | None = None) -> None:
        self.recorded = recorded
        self.cache: dict[Any, Any] = {} if cache is None else cache

    def site(self, path: str, module: nn.Module) -> Site | Miss:
        if is_parametrized(module):
            names = " and ".join(module.get_submodule("parametrizations")._modules)
            return Miss(
                f"its {names} is computed by a parametrization in each call; make it a plain parameter first "
                "by torch.nn.utils.parametrize.remove_parametrizations"
            )
        args = example_for(module)
        if args is not None and not isinstance(module._parameters.get("weight"), nn.Parameter):
            return Miss("its weight is computed by a hook in each call; remove the reparametrization first")
        if args is not None and is_stock(module):
            with _without_hooks(module):
                return Site(path, module, capture_module(module, args, path=path, cache=self.cache))
        given = self._arguments(module)
        if not isinstance(given, Miss):
            return self._traced(path, module, given)
        if args is None:
            return given
        site = self._traced(path, module, args)
        # Without data, the rank that the module will get is not known.
        return given if isinstance(site, Site) and site.ranks is not None else site

    def _traced(self, path: str, module: nn.Module, args: tuple[Tensor, ...]) -> Site | Miss:
        """A module with a forward of its own: a graph that holds for what it does, or the reason why not."""
        try:
            gm = self._capture(path, module, args)
        except BitfoldError as error:
            return Miss(str(error))
        mode = state(gm).fake_mode
        assert mode is not None and mode.shape_env is not None
        guards = mode.shape_env.guards
        if guards:
            return Miss(f"its forward goes another way for other sizes of its input (here {guards[0].expr})")
        if not self._same_in_other_mode(path, module, args, gm):
            return Miss("its forward does one thing in train() and another in eval(), and would be frozen")
        try:
            wider = self._capture(path, module, tuple(value.unsqueeze(0) for value in args))
            any_rank = str(wider.code) == str(gm.code)
        except BitfoldError:
            any_rank = False
        return Site(path, module, gm, None if any_rank else tuple(value.ndim for value in args))

    def _same_in_other_mode(
        self, path: str, module: nn.Module, args: tuple[Tensor, ...], gm: GraphModule
    ) -> bool:
        modes = {inner: inner.training for inner in module.modules()}
        try:
            module.train(not module.training)
            return str(self._capture(path, module, args).code) == str(gm.code)
        except BitfoldError:
            return False
        finally:
            for inner, mode in modes.items():
                inner.training = mode

    def _capture(self, path: str, module: nn.Module, args: tuple[Tensor, ...]) -> GraphModule:
        with _without_hooks(module):
            return capture_module(module, args, path=path)

    def _arguments(self, module: nn.Module) -> tuple[Tensor, ...] | Miss:
        """What a module of an unknown kind is called with, if that is tensors in a fixed order."""
        held = ", ".join(name for name, parameter in module._parameters.items() if _is_weight(parameter))
        what = f"a {type(module).__name__} that owns {held}"
        if any(next(child.parameters(), None) is not None for child in module.children()):
            return Miss(f"{what} beside modules with weights of their own: scope='program' can quantize it")
        if module not in self.recorded:
            why = (
                "the example data does not reach it"
                if self.recorded
                else "give example_inputs or calibration"
            )
            return Miss(f"{what} is traced with the arguments that it gets in the model: {why}")
        args, kwargs = self.recorded[module]
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        if bound.kwargs or not all(isinstance(value, Tensor) for value in bound.args):
            return Miss(f"{what} is called with more than tensors in order: scope='program' can quantize it")
        return bound.args


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """The user's hooks run around the folded forward as before, so the graph must not hold them too. What a
    module's own `.compile()` has put in the place of its call cannot be traced."""
    kept = [(inner, inner._forward_hooks, inner._forward_pre_hooks) for inner in module.modules()]
    calls = {inner: inner.__dict__.pop("_compiled_call_impl", None) for inner in module.modules()}
    try:
        for inner, _, _ in kept:
            inner._forward_hooks, inner._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for inner, after, before in kept:
            inner._forward_hooks, inner._forward_pre_hooks = after, before
        for inner, call in calls.items():
            if call is not None:
                inner.__dict__["_compiled_call_impl"] = call


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own a weight, by path; one that a parametrization computes is its module's."""
    lists = [module for module in model.modules() if isinstance(module, ParametrizationList)]
    inside = {inner for module in lists for inner in module.modules()}
    found = {path: module for path, module in model.named_modules() if module not in inside}
    return {path: module for path, module in found.items() if _owns_weight(module)}


def _owns_weight(module: nn.Module) -> bool:
    if isinstance(module, Folded | torch.jit.ScriptModule | GraphModule):
        return False
    parameters = [*module._parameters.values()]
    if is_parametrized(module):
        parameters += module.get_submodule("parametrizations").parameters()
    return any(_is_weight(parameter) for parameter in parameters)


def _is_weight(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.is_floating_point() and parameter.ndim >= 2


def _tied_heads(owners: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of linears whose weight is an embedding's too, which the linear's own graph does not show."""
    tables = {id(module.weight) for module in owners.values() if isinstance(module, nn.Embedding)}
    for path, module in owners.items():
        if not isinstance(module, nn.Embedding) and id(getattr(module, "weight", None)) in tables:
            yield path


def _split_ties(sites: list[Site]) -> Iterator[MissRecord]:
    """Tied weights that are asked for in different formats are stored once for each; that is said."""
    formats: dict[int, tuple[str, str]] = {}
    for site in sites:
        parameter = site.module._parameters.get("weight")
        for node, note in annotated(site.gm):
            if parameter is None or not note.weight:
                continue
            layer, text = formats.setdefault(id(parameter), (site.path, note.weight))
            if note.weight != text:
                reason = f"the weight is tied to {layer}, which takes {text}, so it is stored in both formats"
                yield MissRecord(node.name, site.path, "", f"weight {note.weight}", reason)
