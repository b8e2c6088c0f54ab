"""The `torch.compile` backend "bitfold": a frame's graph in, a compiled function on codes out.

In: the graph that Dynamo captured and the real parameters. Out: a function of the same arguments which
replaces the folded parameters by their codes in each call. The user's own are neither altered nor freed.

    fast = torch.compile(model, backend="bitfold", options={"recipe": "int4"})
    with torch.inference_mode(): fast(x)

    Dynamo's (x, fc.weight, norm.weight)  ->  inner(x, norm.weight, codes, scales), compiled by the target

A parameter that changes is folded anew in the next call. A change is known by the tensor's version and
address, so a write through `.data` (`weight.data.mul_(2)`), or to a parameter made under
`torch.inference_mode()`, which has no version, is not seen: call `torch.compiler.reset()` after it.

Found by torch through the entry point `torch_dynamo_backends`: nothing of bitfold needs to be imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats import BitfoldError
from ..passes import Miss, Pipeline, Trace, capture_frame, is_training_graph, state
from ..passes.annotate import Annotate
from ..passes.core import META_KEY
from ..passes.edit import fake_mode
from ..passes.fold import Fold
from ..passes.fuse import Fuse, inline
from ..passes.observing.observe import Observe
from ..passes.recipes import Recipe
from ..passes.stages import find_attribute
from .frame_key import frame_key
from .inductor import STATIC
from .kv_cache.quantize import QuantizeCache, speaks_of_caches
from .lower import Lower
from .options import DEFAULT_RECIPE, Options, deliver
from .reference import ReferenceTarget
from .shared_regions import share_regions
from .target import KEPT, Compiled, Target, default_target, get_target
from .weight_store import GraphWeights, Slot, Stamp, WeightStore, stamp

# The one thing here that changes: all graphs of the process share codes, which die with their parameters.
_store = WeightStore()


def bitfold(
    gm: GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compile one graph. `options` as in `Options`; a mistake in them is a BitfoldError before any work."""
    chosen = Options.parse(options)
    target = _target(chosen, example_inputs)
    if is_training_graph(example_inputs) and not chosen.inference:
        warnings.warn(
            "bitfold quantizes for inference, and this graph would be trained (grad mode is on and an input "
            "requires grad), so it runs unquantized: call the model under torch.inference_mode(), or give "
            'options={"inference": True}',
            stacklevel=2,
        )
        return _compile_as_it_is(gm, example_inputs, target, chosen)
    _refuse_autocast(gm)
    with torch.no_grad() if chosen.inference else torch.set_grad_enabled(torch.is_grad_enabled()):
        key = _key(gm, example_inputs, target, chosen)
        found = target.recalled(key) if isinstance(key, str) else key
        run = _compile_folded(gm, example_inputs, target, chosen, key) if isinstance(found, Miss) else found
    return torch.no_grad()(run) if chosen.inference else run


def _target(options: Options, inputs: Sequence[Any]) -> Target:
    names = options.targets()
    return get_target(names[0] if names else default_target(_device(inputs)))


def _device(inputs: Sequence[Any]) -> torch.device:
    return next((given.device for given in inputs if isinstance(given, Tensor)), torch.device("cpu"))


def _compile_as_it_is(gm: GraphModule, inputs: Sequence[Any], target: Target, options: Options) -> Compiled:
    """The graph unquantized: eagerly on the reference target, else by Inductor."""
    if isinstance(target, ReferenceTarget):
        return gm.forward
    return get_target(default_target(_device(inputs))).compile(gm, inputs, options.config())


def _refuse_autocast(gm: GraphModule) -> None:
    """Autocast would round what the folded operators compute at places of its own choice."""
    region = any(
        node.target is torch.amp.autocast_mode._enter_autocast and _enabled(node) for node in gm.graph.nodes
    )
    if region or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise BitfoldError(
            "bitfold does not compile under torch.autocast; cast the model, model.to(torch.bfloat16), "
            "and call it outside of autocast"
        )


def _enabled(node: Node) -> bool:
    given = (*node.args, *[None] * 4)  # device type, dtype, enabled, cache
    return bool(node.kwargs.get("enabled", given[2]) is not False)


def pipeline(options: Options, target: Target) -> Pipeline:
    """The passes that these options ask for."""
    if options.pipeline is not None:
        return Pipeline.parse(options.pipeline)
    names = ",".join(options.targets()) or target.name
    recipe = str(options.recipe or DEFAULT_RECIPE)
    # Buffers are the user's here: the pass says so of every cache that the recipe means.
    caches = [QuantizeCache(recipe=recipe)] if speaks_of_caches(Recipe.parse(recipe)) else []
    return Pipeline([*caches, Annotate(recipe=recipe), Fold(), Fuse(), Lower(target=names)])


def _key(gm: GraphModule, inputs: Sequence[Any], target: Target, options: Options) -> str | Miss:
    """By which the compiled frame is kept for other processes. Codes made here are of weights' values, and
    names of layers, which a key does not hold; a pipeline's passes may be anybody's."""
    recipe = Recipe.parse(options.recipe or DEFAULT_RECIPE)
    if options.pipeline is not None or options.trace is not None:
        return Miss("passes are to be run")
    if not all(rule.skip for rule in recipe.rules) or speaks_of_caches(recipe):
        return Miss("there may be something to fold")
    return frame_key(gm, inputs, [target.name, str(recipe), repr(sorted(options.config().items()))])


def _compile_folded(
    gm: GraphModule, inputs: Sequence[Any], target: Target, options: Options, key: str | Miss
) -> Compiled:
    steps = pipeline(options, target)
    _refuse_calibration(steps)
    graph = capture_frame(gm, inputs)
    weights = GraphWeights(_store)
    state(graph).store = weights
    positions = {node.name: index for index, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    _mark_static(gm, graph)
    trace = steps.run(graph, record=options.trace is not None)
    deliver(options.trace, trace)
    _warn_unmatched(steps, trace, graph)
    _warn_unversioned(graph, weights)
    if target.shares_regions:
        share_regions(graph)
    inline(graph)
    target.finish(graph)
    slots = _lift(graph, weights, positions)
    kept, watched = _drop_unused(graph, slots, inputs, positions)
    graph.recompile()
    examples = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    if isinstance(key, str) and not slots and not watched:
        graph.meta[KEPT] = (key, kept)
    inner = target.compile(graph, examples, options.config())
    graph.meta.pop(META_KEY)  # it holds the user's parameters, which a target that keeps the graph must not
    return _Call(inner, kept, slots, watched)


def _mark_static(given: GraphModule, graph: GraphModule) -> None:
    """Say of each input whether it is a module's own tensor, as Dynamo does."""
    old, new = (gm.graph.find_nodes(op="placeholder") for gm in (given, graph))
    for before, node in zip(old, new, strict=True):
        known = before.meta.get("tensor_dict") or {}
        node.meta[STATIC] = bool(known.get("_dynamo_static_input_type"))


def _warn_unmatched(steps: Pipeline, trace: Trace, graph: GraphModule) -> None:
    """A recipe that means none of the layers here is most likely misspelled. A graph without weights (what
    is left between graph breaks), or with codes in their place, has no layer that it could mean."""
    asked = []
    for step, done in zip(steps.passes, trace.steps[1:], strict=True):
        if not isinstance(step, Annotate):
            continue
        recipe = Recipe.parse(step.recipe)
        if done.rewrites or all(rule.skip for rule in recipe.rules):
            return
        asked.append(recipe.name)
    weights = any(given.is_floating_point() and given.ndim > 1 for given in state(graph).params.values())
    folded = any(given.dtype == torch.uint8 for given in state(graph).params.values())
    if asked and weights and not folded:
        warnings.warn(
            f"recipe {asked[0]!r} matches no layer of this graph, which runs unquantized; its rules go by "
            "the paths that model.named_modules() gives",
            stacklevel=2,
        )


def _warn_unversioned(graph: GraphModule, weights: GraphWeights) -> None:
    """Parameters whose changes cannot be seen."""
    names = [
        state(graph).param_paths.get(name, name)
        for name, given in state(graph).params.items()
        if given.is_inference() and any(use.parameter is given for use in weights.uses)
    ]
    if names:
        warnings.warn(
            f"{len(names)} parameters ({names[0]}, ..) were made under torch.inference_mode(), so bitfold "
            "cannot see them change; call torch.compiler.reset() after changing one, or make them outside",
            stacklevel=2,
        )


def _refuse_calibration(steps: Pipeline) -> None:
    """A range to be calibrated needs data, which a compiled call has not."""
    for step in steps.passes:
        recipe = Recipe.parse(step.recipe) if isinstance(step, Annotate) else None
        if isinstance(step, Observe) or (recipe and any(rule.observer for rule in recipe.rules)):
            raise BitfoldError(
                "this recipe calibrates ranges of activations, and torch.compile has no data for that; use "
                "bitfold.quantize(model, recipe, calibration=batches) first, and then torch.compile"
            )


def _lift(graph: GraphModule, weights: GraphWeights, positions: Mapping[str, int]) -> list[Slot]:
    """Turn the codes that are attributes of the graph into inputs behind the others, in slot order."""
    owner = weights.settle()
    given = {id(tensor): positions[name] for name, tensor in state(graph).params.items()}
    nodes: dict[tuple[int, int], list[Node]] = {}
    uses = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        found = owner.get(id(find_attribute(graph, str(node.target))))
        if found is not None:
            use, part = found
            uses[id(use)] = use
            nodes.setdefault((id(use), part), []).append(node)
    slots = []
    last = list(graph.graph.find_nodes(op="placeholder"))[-1]
    for key, use in uses.items():
        slots.append(Slot(given[id(use.parameter)], use, weights.store))
        for part, tensor in enumerate(use.codes.parts):
            last = _as_input(graph, nodes.get((key, part), []), tensor, last)
    return slots


def _as_input(graph: GraphModule, readers: Sequence[Node], tensor: Tensor, after: Node) -> Node:
    with graph.graph.inserting_after(after):
        new = graph.graph.placeholder(readers[0].name if readers else "unused")
    new.meta["val"], new.meta[STATIC] = fake_mode(graph).from_tensor(tensor, static_shapes=True), True
    for node in readers:
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    return new


def _drop_unused(
    graph: GraphModule, slots: Sequence[Slot], inputs: Sequence[Any], positions: Mapping[str, int]
) -> tuple[list[int], list[_Watched]]:
    """Take folded parameters out of the graph's inputs. Returns the arguments that are left, and those
    parameters whose values went into constants that no slot makes anew.
    """
    followed = {slot.index for slot in slots}
    params, kept, watched = state(graph).params, [], []
    for node in list(graph.graph.find_nodes(op="placeholder")):
        index = positions.get(node.name)
        if index is None:
            continue
        if node.users or node.name not in params:
            kept.append(index)
            continue
        graph.graph.erase_node(node)
        if index not in followed:
            watched.append(_Watched(index, node.name, stamp(params[node.name])))
    return kept, watched


class _Watched:
    """A parameter that a pass turned into a constant: if it changes, the compiled graph is stale."""

    def __init__(self, index: int, name: str, seen: Stamp) -> None:
        self.index, self.name, self.seen = index, name, seen

    def check(self, given: Tensor) -> None:
        if stamp(given) != self.seen:
            raise BitfoldError(
                f"the parameter {self.name} has changed since its graph was compiled, and this pipeline "
                "keeps a constant made of it; call torch.compiler.reset() and compile again"
            )


class _Call:
    """The compiled function: takes the arguments of Dynamo's graph, passes on those of the folded graph."""

    def __init__(
        self, inner: Compiled, kept: Sequence[int], slots: Sequence[Slot], watched: Sequence[_Watched]
    ) -> None:
        self.inner, self.kept, self.slots, self.watched = inner, tuple(kept), tuple(slots), tuple(watched)

    def __call__(self, *args: Any) -> Any:
        for watched in self.watched:
            watched.check(args[watched.index])
        given = [args[index] for index in self.kept]
        for slot in self.slots:
            given += slot.parts(args[slot.index])
        return self.inner(*given)
