"""What can be drawn, and how each of it becomes a trace: a trace, an inspection, a graph, a module, a
compiled function.

In: any of these; inputs where it has to be called. Out: a `Subject`.

    subject(trace)                                  the trace, with its graph's kernels while that lives
    subject(inspect(model, pipeline, inputs))       with errors, times, kernels, tensors
    subject(gm)                                     a graph, as it is; with inputs, with times too
    subject(model, inputs=(x,))                     captured as one graph, quantized or not, with times
    subject(torch.compile(model, backend="bitfold", options=...), inputs=(x,))     all that the backend made
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ...formats.errors import BitfoldError
from ...lowering.backend import bitfold as backend
from ...passes import Trace, capture, capture_frame
from ...passes.pipeline import Pipeline
from .errors import NodeError
from .overlay import all_errors

if TYPE_CHECKING:
    from ..inspection import Inspection

_KINDS = "a Trace, an Inspection, a graph, a module or a function of torch.compile(backend='bitfold')"


@dataclass(frozen=True)
class Subject:
    """A trace, and what else is known of it; explained: whether the inspection knows the model before, so
    that findings mean something; graphs: how many a compiled function has (the largest is drawn)."""

    trace: Trace
    errors: Mapping[str, NodeError] = field(default_factory=dict)
    inspection: Inspection | None = None
    explained: bool = False
    graphs: int = 1


def subject(thing: Any, inputs: Sequence[Any] | None = None) -> Subject:
    """BitfoldError, in a sentence, for what cannot be drawn."""
    from ..inspection import Inspection, look_at_graph

    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    if isinstance(thing, Inspection):
        return _inspected(thing)
    if isinstance(thing, Trace):
        return _traced(thing)
    if isinstance(thing, GraphModule):
        trace = Pipeline(()).run(thing, verify=False)
        return Subject(trace, inspection=look_at_graph(trace, thing, inputs))
    options = _options_of(thing)
    if options is not None:
        return _compiled(thing, options, _needed(inputs, "a compiled function is compiled for its inputs"))
    if isinstance(thing, nn.Module):
        given = _needed(inputs, "a module becomes a graph by calling it")
        with torch.no_grad():
            gm = capture(thing, tuple(given))
            trace = Pipeline(()).run(gm, verify=False)
        return Subject(trace, inspection=look_at_graph(trace, gm, given))
    raise BitfoldError(f"viz() draws {_KINDS}, not a {type(thing).__name__}")


def _inspected(found: Inspection, graphs: int = 1) -> Subject:
    return Subject(found.trace, all_errors(found), found, explained=True, graphs=graphs)


def _traced(trace: Trace) -> Subject:
    """With the kernels of its graph, while that lives; the trace itself stays as it is."""
    from ..inspection import look_at_graph

    if not trace.steps:
        raise BitfoldError("the trace is empty: run a pipeline first, then pass what Pipeline.run returned")
    if not trace.recorded:
        raise BitfoldError("the trace holds no graphs: run the pipeline with record=True (the default)")
    gm = trace.gm
    if gm is None:
        return Subject(trace)
    longer = Trace(list(trace.steps))
    longer.follow(gm)
    return Subject(longer, inspection=look_at_graph(longer, gm, None))


def _needed(inputs: Sequence[Any] | None, why: str) -> Sequence[Any]:
    if inputs is None:
        raise BitfoldError(f"{why}, so viz needs them: bf.viz(thing, path, inputs=(x,))")
    return inputs


def _options_of(thing: Any) -> Mapping[str, Any] | None:
    """The options that torch.compile was given with this backend; None for anything else."""
    step = getattr(getattr(thing, "dynamo_ctx", None), "callback", None)
    if step is None and hasattr(thing, "_torchdynamo_orig_callable"):
        # A function that was compiled keeps what compiles it in its closure alone.
        step = inspect.getclosurevars(thing).nonlocals.get("callback")
    while step is not None:
        if getattr(step, "compiler_fn", None) is backend:
            options = step.kwargs.get("options") if hasattr(step, "kwargs") else None
            return dict(options or {})
        step = getattr(step, "_torchdynamo_orig_backend", None)
    return None


@dataclass
class _Heard:
    """One graph of a compiled function: before the passes and after them, and what it was called with."""

    trace: Trace
    reference: GraphModule
    gm: GraphModule
    inputs: tuple[Any, ...] | None = None


def _compiled(thing: Any, options: Mapping[str, Any], inputs: Sequence[Any]) -> Subject:
    """Compiled once more, with an ear at the backend, and called once; the function itself stays as it is."""
    from ..inspection import look_back
    from ..lowered import twin

    graphs: list[_Heard] = []

    def listening(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        heard: list[_Heard] = []
        reference = capture_frame(gm, example_inputs)

        def hear(trace: Trace) -> None:
            # What the backend does with the graph after the passes is not to be seen in it.
            if trace.gm is not None:
                heard.append(_Heard(trace, reference, twin(trace.gm)))

        run = backend(gm, example_inputs, options={**options, "trace": hear})
        graphs.extend(heard)

        def call(*args: Any) -> Any:
            for one in heard:
                one.inputs = args
            return run(*args)

        return call

    model = getattr(thing, "_orig_mod", None) or thing._torchdynamo_orig_callable
    fast: Any = torch.compile(model, backend=listening)
    with torch.inference_mode():
        fast(*inputs)
        called = [one for one in graphs if one.inputs is not None]
        if not called:
            raise BitfoldError(
                "the compiled function made no graph of these inputs, so there is nothing to draw"
            )
        largest = max(called, key=lambda one: len(one.trace.steps[-1].snapshot))
        found = look_back(largest.trace, largest.reference, largest.gm, largest.inputs or ())
    return _inspected(found, graphs=len(graphs))
