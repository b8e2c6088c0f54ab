"""Which modules of a model are quantized one by one, and each as an annotated graph: the plan, before any
write.

In: a model and a recipe. Out: a `Site` for each module to fold, with its captured and annotated graph, and
what was asked for in vain. Everything that may be the user's mistake is found here.

    plan(LlamaForCausalLM, int4)  ->  Site("model.layers.0.self_attn.q_proj", nn.Linear, graph: linear(x,
    weight)), ...

The module is the smallest one that owns a weight and traces alone. Kinds with known arguments (linear,
convolution, embedding) are traced from their sizes; others with the arguments that they get when the model
runs on an example.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedParameter

from ..formats import BitfoldError, Quantized, nearest
from ..passes import MissRecord, Pipeline, capture_module, example_for, state
from ..passes.annotate import Annotate
from ..passes.note import annotated
from ..passes.recipes import Recipe
from .folded import Folded

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a call."""

Step = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and how many there are."""


@dataclass
class Site:
    """One module that will be folded, and its graph."""

    path: str
    module: nn.Module
    gm: GraphModule

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
    record: Callable[[Iterable[nn.Module]], Mapping[nn.Module, Call]] | None = None,
    progress: Step | None = None,
) -> Plan:
    """Capture and annotate each module that the recipe means. Raises BitfoldError with nothing written.

    `record` runs the model on example data and returns the arguments that the given modules got.
    """
    names = parameter_names(model)
    known = expanded(stored, model, names)
    check_parameters(model)
    owners = {path: module for path, module in model.named_modules() if _owns_weight(module)}
    unknown = [module for module in owners.values() if example_for(module) is None]
    recorded = record(unknown) if record is not None and unknown else {}
    heads = " ".join(_tied_heads(owners))
    found, cache = Plan(), {}  # type: ignore[var-annotated]
    for done, (path, module) in enumerate(owners.items()):
        if progress is not None:
            progress(f"check {path}", done, len(owners))
        args = example_for(module) or _plain_call(module, recorded)
        if args is None:
            found.misses += _not_tried(path, module, recipe, recorded)
            continue
        gm = capture_module(module, args, path=path, cache=cache)
        state(gm).stored = known
        trace = Pipeline([Annotate(recipe=str(recipe), heads=heads)]).run(gm)
        found.misses += trace.misses
        if any(True for _ in annotated(gm)):
            found.sites.append(Site(path, module, gm))
    found.misses += _split_ties(found.sites)
    return found


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every path of every parameter, by the parameter's identity: more than one if it is tied."""
    names: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path)
    return names


def expanded(
    stored: Mapping[str, Quantized], model: nn.Module, names: dict[int, list[str]]
) -> dict[str, Quantized]:
    """The user's codes under every path of their parameter. Raises BitfoldError for a path that is no
    parameter.
    """
    by_path = {path: paths for paths in names.values() for path in paths}
    out: dict[str, Quantized] = {}
    for path, codes in stored.items():
        if path not in by_path:
            raise BitfoldError(
                f"stored has codes for {path!r}, which is no parameter of this {type(model).__name__}"
                f"{nearest(path, by_path)}"
            )
        out.update(dict.fromkeys(by_path[path], codes))
    return out


def check_parameters(model: nn.Module) -> None:
    """Raises BitfoldError for parameters that hold no numbers yet, or not all of them."""
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise BitfoldError(
                f"{path} is a lazy parameter without a shape; run the model once before bf.quantize"
            )
        if isinstance(parameter, DTensor):
            raise BitfoldError(f"{path} is sharded already; call bf.quantize before fully_shard")
        if parameter.is_meta:
            raise BitfoldError(
                f"{path} is on the meta device and has no numbers; load the weights before bf.quantize, or "
                "use bf.load(path, into=model) for a model that was saved quantized"
            )


def _owns_weight(module: nn.Module) -> bool:
    if isinstance(module, Folded | torch.jit.ScriptModule | GraphModule):
        return False
    return any(_is_weight(parameter) for parameter in module._parameters.values())


def _is_weight(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.is_floating_point() and parameter.ndim >= 2


def _tied_heads(owners: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of linears whose weight is an embedding's too, which the linear's own graph does not show."""
    tables = {id(module.weight) for module in owners.values() if isinstance(module, nn.Embedding)}
    for path, module in owners.items():
        if not isinstance(module, nn.Embedding) and id(getattr(module, "weight", None)) in tables:
            yield path


def _plain_call(module: nn.Module, recorded: Mapping[nn.Module, Call]) -> tuple[Any, ...] | None:
    """The recorded arguments of a module that owns all its tensors, if all are tensors in a fixed order."""
    if module not in recorded or any(
        next(child.parameters(), None) is not None for child in module.children()
    ):
        return None
    args, kwargs = recorded[module]
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    plain = not bound.kwargs and all(isinstance(value, Tensor) for value in bound.args)
    return bound.args if plain else None


def _not_tried(
    path: str, module: nn.Module, recipe: Recipe, recorded: Mapping[nn.Module, Call]
) -> list[MissRecord]:
    """A module that cannot be traced alone: reported if the recipe could mean it."""
    if not recipe.rules:
        return []
    weights = ", ".join(name for name, parameter in module._parameters.items() if _is_weight(parameter))
    why = "give example_inputs or calibration data, from which the arguments that it gets are taken"
    if module in recorded:
        why = "it has modules with weights inside, or is called with more than tensors; try scope='program'"
    elif recorded:
        why = "the example data does not reach it"
    reason = f"a {type(module).__name__} that owns {weights} cannot be traced from its sizes alone: {why}"
    return [MissRecord(path, path, "", str(recipe), reason)]


def _split_ties(sites: list[Site]) -> list[MissRecord]:
    """Tied weights that are asked for in different formats are stored once for each; that is said."""
    formats: dict[int, tuple[str, str]] = {}
    out = []
    for site in sites:
        parameter = getattr(site.module, "weight", None)
        for node, note in annotated(site.gm):
            layer, text = (
                formats.setdefault(id(parameter), (site.path, note.weight or ""))
                if parameter is not None
                else ("", "")
            )
            if parameter is not None and note.weight and text and note.weight != text:
                reason = f"the weight is tied to {layer}, which takes {text}, so it is stored in both formats"
                out.append(MissRecord(node.name, site.path, "", f"weight {note.weight}", reason))
    return out
