"""What can be drawn, and how each of it becomes a trace: a trace, an inspection, a graph, a module, a
compiled function.

In: any of these; inputs where it has to be called. Out: a `Subject`.

    subject(trace)                                  the trace
    subject(inspect(model, pipeline, inputs))       with errors, times, kernels, tensors
    subject(gm)                                     a graph, as it is
    subject(model, inputs=(x,))                     captured as one graph, quantized or not
    subject(torch.compile(model, backend="bitfold", options=...), inputs=(x,))     what the backend made of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from ...formats.errors import BitfoldError
from ...lowering.backend import bitfold as backend
from ...passes import Trace, capture
from ...passes.pipeline import Pipeline
from .errors import NodeError
from .overlay import all_errors

if TYPE_CHECKING:
    from ..inspection import Inspection

Drawn = Trace | GraphModule | nn.Module
_KINDS = "a Trace, an Inspection, a graph, a module or a function of torch.compile(backend='bitfold')"


@dataclass(frozen=True)
class Subject:
    """A trace, and what else is known of it; graphs: how many a compiled function has (the largest is
    drawn)."""

    trace: Trace
    errors: Mapping[str, NodeError] = field(default_factory=dict)
    inspection: Inspection | None = None
    graphs: int = 1


def subject(thing: Any, inputs: Sequence[Any] | None = None) -> Subject:
    """BitfoldError, in a sentence, for what cannot be drawn."""
    from ..inspection import Inspection

    if isinstance(thing, Inspection):
        return Subject(thing.trace, all_errors(thing), thing)
    if isinstance(thing, Trace):
        if not thing.steps:
            raise BitfoldError(
                "the trace is empty: run a pipeline first, then pass what Pipeline.run returned"
            )
        if not thing.recorded:
            raise BitfoldError("the trace holds no graphs: run the pipeline with record=True (the default)")
        return Subject(thing)
    if isinstance(thing, GraphModule):
        return Subject(Pipeline(()).run(thing, verify=False))
    options = _options_of(thing)
    if options is not None:
        return _compiled(thing, options, _needed(inputs, "a compiled function is compiled for its inputs"))
    if isinstance(thing, nn.Module):
        given = _needed(inputs, "a module becomes a graph by calling it")
        with torch.no_grad():
            gm = capture(thing, tuple(given))
            trace = Pipeline(()).run(gm, verify=False)
        # The graph is nobody else's: what is in its regions is asked of it while it lives.
        trace.follow(gm)
        return Subject(_Kept(trace.steps, gm))
    raise BitfoldError(f"viz() draws {_KINDS}, not a {type(thing).__name__}")


class _Kept(Trace):
    """A trace that keeps its graph alive."""

    def __init__(self, steps: list[Any], gm: GraphModule) -> None:
        super().__init__(steps)
        self._kept = gm
        self.follow(gm)


def _needed(inputs: Sequence[Any] | None, why: str) -> Sequence[Any]:
    if inputs is None:
        raise BitfoldError(f"{why}, so viz needs them: bf.viz(thing, path, inputs=(x,))")
    return inputs


def _options_of(thing: Any) -> Mapping[str, Any] | None:
    """The options that torch.compile was given with this backend; None for anything else."""
    step = getattr(getattr(thing, "dynamo_ctx", None), "callback", None)
    if step is None and callable(thing):
        step = getattr(thing, "_torchdynamo_orig_backend", None)
    while step is not None:
        if getattr(step, "compiler_fn", None) is backend:
            options = step.kwargs.get("options") if hasattr(step, "kwargs") else None
            return dict(options or {})
        step = getattr(step, "_torchdynamo_orig_backend", None)
    return None


def _compiled(thing: Any, options: Mapping[str, Any], inputs: Sequence[Any]) -> Subject:
    """Compiled once more, with an ear at the backend; the function itself stays as it is."""
    traces: list[Trace] = []
    model = thing._orig_mod
    with_trace: dict[str, Any] = {**options, "trace": traces}
    fast: Any = torch.compile(model, backend="bitfold", options=with_trace)
    with torch.inference_mode():
        fast(*inputs)
    if not traces:
        raise BitfoldError("the compiled function made no graph of these inputs, so there is nothing to draw")
    largest = max(traces, key=lambda trace: len(trace.steps[-1].snapshot))
    return Subject(largest, graphs=len(traces))
