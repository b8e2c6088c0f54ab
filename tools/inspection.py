"""Everything there is to see of a pipeline on a model and an input: trace, errors, kernels, work, tensors.

In: a model, a pipeline, inputs. Out: an `Inspection`, from which the page, `explain` and the plots are made.

    found = inspect(model, Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=cpu}"), (x,))
    found.errors["fused_fc"].isolated_db; found.work["fused_default"].seconds;
    found.kernels["fused_default"].source

What a target makes of the lowered graph just before it is compiled (regions put back, operations around a
kernel become part of it) is shown as a last step, `finish`: its nodes are the kernels that run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..codegen.device import present
from ..formats import Quantized
from ..lowering import Pipeline
from ..lowering.lower import Lower
from ..lowering.parameters import with_all_names
from ..passes import Pass, Recipe, Trace, capture, inline, state
from .held import as_it_was
from .lowered import finished, kernels, last_lower, reads, twin, work_on_paper
from .on_paper import OnPaper
from .roof import Roof, of_card, roof_of
from .viz.activations import Flow, Flows
from .viz.errors import NodeError, node_errors
from .viz.kernels import Kernel
from .viz.tensors import WeightStats, weight_stats
from .viz.watch import Watched
from .work import Work, measure

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """`reference`: the captured graph; `gm`: what the pipeline made of it; `final`: what is compiled of that.
    `errors` and `flows` go by nodes of `gm` and of its regions, `work` and `kernels` by nodes of `final`,
    `baseline` (work that was only counted) by nodes of `reference`, `weights` by the attribute that holds the
    codes."""

    trace: Trace
    reference: GraphModule
    gm: GraphModule
    final: GraphModule
    recipe: Recipe | None
    errors: Mapping[str, NodeError] = field(default_factory=dict)
    flows: Mapping[str, Flow] = field(default_factory=dict)
    weights: Mapping[str, WeightStats] = field(default_factory=dict)
    work: Mapping[str, Work] = field(default_factory=dict)
    baseline: Mapping[str, Work] = field(default_factory=dict)
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    roof: Roof | None = None

    @property
    def on_paper(self) -> bool:
        """Whether the kernels are those of a device that is not there, so that nothing of them was run."""
        return any(f"target={OnPaper.name}" in step.options for step in self.trace.steps)


def inspect(
    model: nn.Module,
    pipeline: Pipeline | str,
    inputs: Sequence[Any],
    *,
    dynamic: str | None = None,
    stored: Mapping[str, Quantized] | None = None,
    calibrate: Callable[[GraphModule], None] | None = None,
    runs: int = 5,
    registers: bool = True,
    progress: Progress = lambda _: None,
) -> Inspection:
    """Capture the model, run the pipeline (or its text) on it and look at what came of it. The model is left
    as it was. runs: timed calls, 0 for none; registers: compile kernels for a GPU that is not there, to learn
    of them; stored: codes that came with the model, by path; calibrate: called with the graph before the
    first pass behind `observe`."""
    steps = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    with torch.no_grad():
        progress("capturing the model as one graph")
        gm = capture(model, tuple(inputs), dynamic=dynamic)
        given = _Given(steps, twin(gm), gm, tuple(inputs), progress)
        state(gm).stored = with_all_names(dict(stored or {}), model)
        progress(f"running {steps}")
        trace, compared = _run(given, calibrate)
        return _look(given, trace, compared, runs=runs, registers=registers)


@dataclass(frozen=True)
class _Given:
    """One pipeline on one model."""

    pipeline: Pipeline
    reference: GraphModule
    gm: GraphModule
    inputs: tuple[Any, ...]
    progress: Progress

    @property
    def lower(self) -> Lower | None:
        """The last pass that lowers."""
        return next((step for step in reversed(self.pipeline.passes) if isinstance(step, Lower)), None)

    @property
    def recipe(self) -> Recipe | None:
        """Of the first pass that has one."""
        texts = (getattr(step, "recipe", None) for step in self.pipeline.passes)
        return next((Recipe.parse(text) for text in texts if text is not None), None)

    def compare(self) -> Compared:
        """The graph as it is now against the captured one."""
        self.progress("comparing with the unquantized model")
        flows = Flows()
        return node_errors(self.reference, self.gm, self.inputs, see=flows.see), flows.found


Compared = tuple[Mapping[str, NodeError], Mapping[str, Flow]]


def look_back(
    trace: Trace, reference: GraphModule, gm: GraphModule, inputs: Sequence[Any], *, runs: int = 5
) -> Inspection:
    """The same of a pipeline that has run: `reference` and `gm` are the graph before and after it, on the
    inputs of both. `trace` gets the last step."""
    passes = ",".join(str(step) for step in trace.steps[1:])
    given = _Given(Pipeline.parse(passes), reference, gm, tuple(inputs), lambda _: None)
    with torch.no_grad():
        return _look(given, trace, given.compare(), runs=runs, registers=True)


def look_at_graph(
    trace: Trace, gm: GraphModule, inputs: Sequence[Any] | None, *, runs: int = 5
) -> Inspection:
    """What a graph by itself shows: its kernels; with inputs, what it does and what flows in it too. `trace`
    gets the last step, if the graph was lowered."""
    lower = last_lower(trace)
    with torch.no_grad():
        final = gm if lower is None else finished(gm, lower, trace)
        device = _device(inputs or (), gm)
        roof, arch, work, flows = None, _arch(device), {}, Flows()
        if _is_on_paper(lower):
            roof, arch = of_card(OnPaper.card()), OnPaper.card().arch
        elif inputs is not None:
            roof = roof_of(device)
            work = measure(final, inputs, runs=runs)
            with as_it_was(final, inputs):
                Watched(final, lambda node, value, _: flows.see(node, value)).run(*inputs)
        read = reads(final, work)
        generated = kernels(read, arch, compiled=True)
        weights = weight_stats(final, None)
    return Inspection(
        trace, gm, gm, final, None, {}, flows.found, weights, work or work_on_paper(read), {}, generated, roof
    )


def _run(given: _Given, calibrate: Callable[[GraphModule], None] | None) -> tuple[Trace, Compared]:
    """The pipeline, in pieces where something happens in between: data for observers behind `observe`, and
    the comparison in front of a `lower` whose kernels do not run here."""
    trace = Pipeline(()).run(given.gm)
    compared: Compared | None = None
    for piece in _pieces(given.pipeline.passes):
        if _is_on_paper(piece[0]):
            compared = given.compare()
        trace.steps.extend(Pipeline(piece).run(given.gm).steps[1:])
        if piece[-1].name == "observe" and calibrate is not None:
            calibrate(given.gm)
    return trace, compared or given.compare()


def _pieces(passes: Sequence[Pass]) -> list[list[Pass]]:
    """A pass on paper begins a piece, one that observes ends it."""
    pieces: list[list[Pass]] = [[]]
    for step in passes:
        if _is_on_paper(step):
            pieces.append([])
        pieces[-1].append(step)
        if step.name == "observe":
            pieces.append([])
    return [piece for piece in pieces if piece]


def _is_on_paper(step: Pass | None) -> bool:
    """Whether the pass lowers for a device that is not there."""
    return isinstance(step, Lower) and step.target == OnPaper.name


def _look(given: _Given, trace: Trace, compared: Compared, *, runs: int, registers: bool) -> Inspection:
    paper = _is_on_paper(given.lower)
    given.progress("looking at the weights")
    flat = twin(given.gm)
    inline(flat)
    flat.recompile()
    weights = weight_stats(flat, given.reference)
    final = flat if given.lower is None else finished(given.gm, given.lower, trace)
    given.progress("timing operators")
    device = _device(given.inputs, given.gm)
    roof = roof_of(device) if runs else None
    arch = _arch(device)
    if paper:
        roof, arch = of_card(OnPaper.card()), OnPaper.card().arch
    work = {} if paper else measure(final, given.inputs, runs=runs)
    baseline = measure(given.reference, given.inputs, runs=0)
    given.progress("generating kernels")
    read = reads(final, work, baseline)
    generated = kernels(read, arch, compiled=registers)
    return Inspection(
        trace,
        given.reference,
        given.gm,
        final,
        given.recipe,
        *compared,
        weights,
        work or work_on_paper(read),
        baseline,
        generated,
        roof,
    )


def _device(inputs: Sequence[Any], gm: GraphModule) -> torch.device:
    held = [*inputs, *gm.parameters(), *gm.buffers()]
    return next((t.device for t in held if isinstance(t, Tensor)), torch.device("cpu"))


def _arch(device: torch.device) -> int | None:
    return present().arch if device.type == "cuda" else None
