"""`bf.prepare_qat`: a model in, the same model in a form that trains on rounded numbers out.

In: any `nn.Module`, a recipe, and options. Out (module scope): that model, prepared in place; its weights are
the same float parameters, so that any optimizer and any training loop goes on with them. Out (program
scope): a graph of the whole model over the model's own parameters, with `.train()` and `.eval()`.

    bf.prepare_qat(model, "int4[g32]"); train(model); bf.convert(model)

Every check runs before the first write, so that a mistake leaves the model as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...formats import BitfoldError
from ...passes import MissRecord, Pipeline, expression
from ...passes.core import Progress
from ...passes.edges import edge
from ...passes.observing.observe import Observe
from ...passes.recipes import Recipe
from ...passes.stages import find_attribute
from ...passes.training.quantizers import CLOCK, TRAIN_QUANTIZE, TrainQuantizers, ranges
from ..algorithms.calibration import Batches
from ..folded import Folded
from ..given_model import module_of
from ..module_scope import Call, Plan, Site, plan
from ..parameters import check_parameters
from ..quantize import Scope, calibrate_sites, check_found, check_scope, recorder
from ..report import ATTRIBUTE
from ..tracing import TRACING
from .distill import Distill, Teacher, dismiss, teach
from .kernels import check_kernels
from .norms import NAMES, PREFIX, Norm, following_norms, identity, with_norm
from .options import Qat
from .prepared import (
    ATTRIBUTES,
    NORM_NUMBERS,
    Bodies,
    Preparation,
    Prepared,
    bodies_of,
    prepare_module,
    unprepare,
    unprepared,
)
from .schedule import PROGRAM
from .states import check_state, of_model
from .trained_as import trained_as


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
            from .prepared_program import prepare_program

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
            made = _Made(model, wanted, how, calls, earlier, loaded=state is not None)
            _observe(model, found, how, batches, made.ranged, progress)
            if how.fold_norm:
                made.norms, misses = following_norms(model, found.sites)
                found.misses += misses
            for site in found.sites:
                made.graph(site)
            found.misses += made.misses
            for site in found.sites:
                made.write(site)
            if state is not None:
                try:
                    state = of_model(model, state)
                    check_state(model, state)
                except BitfoldError:
                    made.take_back(found.sites)
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
        raise BitfoldError(_no_range(layer))
    if how.activation_learns and not ranged:
        layer = next(site.path for site in found.sites if site.calibrated)
        raise BitfoldError(
            f"layer {layer} learns the range of its activations, which begins at a calibrated one; give "
            "calibration=[batches]"
        )
    for site in found.sites:
        if site.calibrated:
            Pipeline([Observe()]).run(site.gm, record=False)


def _no_range(layer: str) -> str:
    return (
        f"layer {layer} takes activations of calibrated range; give calibration=[batches], or let "
        "training find them: bf.Qat(observe=200), with bf.advance(model) after each step"
    )


class _Made:
    """The prepared modules of one model: what they share, and the write."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        how: Qat,
        calls: Mapping[nn.Module, Call],
        earlier: Mapping[str, dict[str, Tensor]],
        *,
        loaded: bool,
    ) -> None:
        self.recipe, self.how, self.calls, self.earlier = str(recipe), how, calls, earlier
        self.loaded = loaded
        # Ranges that an earlier recipe had go on; numbers that it had learned are of other formats.
        ranged = loaded or (bool(earlier) and not how.activation_learns)
        clocks = [tensors[CLOCK] for tensors in earlier.values() if CLOCK in tensors]
        self.clock = max(clocks, key=int) if clocks else None
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.tables = tables
        self.passed = train_pass(how, ranged=ranged, loaded=loaded)
        self.ranged = ranged
        self.bodies: dict[Hashable, Bodies] = {}
        self.shared: dict[Hashable, nn.Parameter] = {}
        self.norms: dict[str, Norm] = {}
        self.misses: list[MissRecord] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def graph(self, site: Site) -> None:
        """The site's graph, ready to train; nothing is written to the model."""
        Pipeline([self.passed]).run(site.gm, record=False)
        norm = self.norms.get(site.path)
        if norm is not None and not with_norm(site.gm, norm.module, self.how, loaded=self.loaded):
            del self.norms[site.path]
            reason = "what the convolution gives is rounded before batch norm reads it"
            self.misses.append(MissRecord(norm.path, norm.path, "", "fold_norm", reason))
        self.misses += check_kernels(site.gm)
        share_learned(site.gm, self.shared)
        own = {name for name, _ in (*site.module.named_parameters(), *site.module.named_buffers())}
        own |= {f"{PREFIX}.{name}" for name in NAMES}
        held = (*site.gm.named_parameters(), *site.gm.named_buffers())
        needed = (*(name for name, _ in held if name not in own), *ATTRIBUTES)
        taken = next((name for name in needed if hasattr(site.module, name)), None)
        if taken is not None:
            raise BitfoldError(
                f"layer {site.path} has an attribute {taken!r} already, which training it rounded needs; "
                "rename it, or leave the layer out by a skip rule"
            )
        moves = self.clock is None or int(self.clock) < self.how.observe
        if not (self.how.observe and moves) and not self.loaded:
            self._check_ranges(site, own)

    def _check_ranges(self, site: Site, own: set[str]) -> None:
        """Raises BitfoldError if a range that nothing will move (from the step `observe` on nothing does) has
        seen nothing, now or under an earlier recipe."""
        earlier = self.earlier.get(site.path, {})
        seen = _seen(site.gm)
        for name, held in site.gm.named_buffers():
            if name in own or not held.is_floating_point():
                continue
            if name not in seen and not bool(self._going_on(name, held, earlier, seen).isfinite().all()):
                raise BitfoldError(_no_range(site.path))

    def write(self, site: Site) -> None:
        """Make the site's module a prepared one."""
        bodies, attributes = bodies_of(site.gm)
        bodies = self._shared(bodies)
        module = site.module
        tensors = {name: find_attribute(site.gm, name) for name in attributes if name not in NORM_NUMBERS}
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        added = (name for name in tensors if name not in held and "." not in name)
        extra = {name: tensors[name] for name in added}
        earlier = self.earlier.get(site.path, {})
        seen = _seen(site.gm)
        extra = {name: self._going_on(name, one, earlier, seen) for name, one in extra.items()}
        self._begin_anew(extra, tensors)
        weight = module._parameters.get("weight")
        tied = not isinstance(module, nn.Embedding) and id(weight) in self.tables
        call = self.calls.get(module)
        shapes = None if call is None else tuple((tuple(a.shape), a.dtype) for a in call[0])
        about = Preparation(
            site.path,
            self.recipe,
            self.how,
            tied,
            shapes,
            trains=trained_as(site.gm, self.how),
            ranges=ranges(site.gm),
        )
        norm = self.norms.get(site.path)
        inside = None if norm is None else norm.module
        prepare_module(module, bodies, attributes, extra, about, site.ranks, inside)
        if norm is not None:
            about = Preparation(norm.path, self.recipe, self.how, folded_away=True)
            bodies, _ = bodies_of(identity(norm.path))
            prepare_module(norm.module, self._shared(bodies), (), {}, about, None)

    def take_back(self, sites: Iterable[Site]) -> None:
        """Make the sites' modules what they were."""
        for site in sites:
            norm = self.norms.get(site.path)
            for module in (site.module, *(() if norm is None else (norm.module,))):
                assert isinstance(module, Prepared)
                unprepare(module)
        with torch.no_grad():
            for parameter, numbers in reversed(self.overwritten):  # tied ones come twice
                parameter.copy_(numbers)

    def _going_on(self, name: str, new: Tensor, earlier: Mapping[str, Tensor], seen: set[str]) -> Tensor:
        """What an earlier recipe had under this name, if it can stay: a parameter, which gets new numbers, or
        a buffer, but for those of what a step has `seen`."""
        if name == CLOCK:
            return earlier.get(name, new if self.clock is None else self.clock.to(new.device, copy=True))
        old = earlier.get(name)
        if (
            old is None
            or old.shape != new.shape
            or isinstance(old, nn.Parameter) != isinstance(new, nn.Parameter)
        ):
            return new
        if isinstance(new, nn.Parameter):
            return old
        unseen = name not in seen and new.is_floating_point() and not bool(new.isfinite().all())
        return old if unseen else new

    def _begin_anew(self, extra: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        """Parameters that go on get the numbers that they begin with under this recipe."""
        for name, parameter in extra.items():
            if isinstance(parameter, nn.Parameter) and parameter is not new[name]:
                self.overwritten.append((parameter, parameter.detach().clone()))
                with torch.no_grad():
                    parameter.copy_(new[name])

    def _shared(self, bodies: Bodies) -> Bodies:
        """Modules that are alike share their bodies, so that torch.compile compiles them once."""
        return self.bodies.setdefault(tuple(body.code for body in bodies), bodies)


def _seen(gm: GraphModule) -> set[str]:
    """Buffers that hold what a step saw."""
    return {name for one in ranges(gm) for name in (one.seen_low, one.seen_high)}


def train_pass(how: Qat, *, ranged: bool = False, loaded: bool = False) -> TrainQuantizers:
    """The pass that these options ask for. ranged: ranges are known elsewhere, so that observers may have
    seen nothing; loaded: all numbers are, and none need be searched for."""
    return TrainQuantizers(
        how.weight,
        how.activation,
        warmup=how.warmup,
        observe=bool(how.observe),
        ranged=ranged or loaded,
        clip=how.start == "clip" and not loaded,
    )


def share_learned(gm: GraphModule, shared: dict[Hashable, nn.Parameter]) -> None:
    """Let tied weights of one format have one learned scale, as they will have one set of codes."""
    for node in gm.graph.find_nodes(op="call_function", target=TRAIN_QUANTIZE):
        on: Any = edge(node)
        if on.which != "weight" or not node.args[3]:
            continue
        source: Any = node.args[0]
        if source.target is operator.getitem:  # of a batch norm folded into it
            source = source.args[0].args[0]
        chain = expression(gm, source)
        assert chain is not None, f"{node.name} reads no parameter"
        for which, part in enumerate(node.args[3]):
            name = str(part.target)
            key = (id(chain.parameter), chain.text, node.args[1:3], which)
            gm._parameters[name] = shared.setdefault(key, gm.get_parameter(name))
