"""What runs of a lowered graph: the graph that its target compiles, and the generated kernels in it.

In: a graph that `lower` has rewritten. Out: the graph with its regions put back and the operations around a
kernel taken into it, as a last step of the trace; kernels by node.

    final = finished(gm, last_lower(trace), trace)
    kernels(reads(final, work), arch=None, compiled=False)   ->   {"fused_default": Kernel(...), ...}
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch.fx import Graph, GraphModule, Node

from ..lowering import Pipeline, get_target
from ..lowering.lower import Lower
from ..passes import Trace, inline, snapshot
from ..passes.provenance import FROM_KEY
from ..passes.trace import Step, compare
from .viz.kernels import Kernel, example_shape, kernel_of
from .work import Work, expected


def last_lower(trace: Trace) -> Lower | None:
    """The pass that lowered the trace's graph."""
    for step in reversed(trace.steps):
        if step.name == Lower.name:
            (found,) = Pipeline.parse(str(step)).passes
            return found if isinstance(found, Lower) else None
    return None


def finished(gm: GraphModule, lower: Lower, trace: Trace) -> GraphModule:
    """What the first target compiles of a lowered graph; `gm` stays. `trace` gets it as a last step."""
    final = twin(gm)
    inline(final)
    began = time.perf_counter()
    rewrites = get_target(lower.target.split(",")[0].strip()).finish(final)
    seconds = time.perf_counter() - began
    final.graph.eliminate_dead_code()
    final.recompile()
    now = snapshot(final)
    change = compare(trace.steps[-1].snapshot, now)
    trace.steps.append(Step("finish", "", "lowered", now, rewrites, seconds, (), change))
    return final


def twin(gm: GraphModule) -> GraphModule:
    """A second graph with the same nodes, the same parameters and a copy of what passes know of it; capturing
    again would take longer than all passes together."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    made = GraphModule(gm, graph)
    # `state` gives a graph that is not the owner a copy.
    made.meta.update(gm.meta)
    return made


def reads(final: GraphModule, *known: Mapping[str, Work]) -> dict[Node, tuple[int, ...]]:
    """The shape of what each call reads first: from its run, or from that of the captured node it stands for;
    else from the example that the graph was captured with."""
    found = {}
    for node in final.graph.nodes:
        names = (node.name, *node.meta.get(FROM_KEY, ()))
        seen = [work[name].read for name in names for work in known if name in work]
        found[node] = next((shape for shape in seen if shape), example_shape(node))
    return found


def kernels(read: Mapping[Node, tuple[int, ...]], arch: int | None, *, compiled: bool) -> dict[str, Kernel]:
    """By node. arch: a GPU's compute capability, None for this processor; compiled: to learn of registers."""
    found = {
        node.name: kernel_of(node, read=shape, gpu=arch, compiled=compiled) for node, shape in read.items()
    }
    return {name: kernel for name, kernel in found.items() if kernel is not None}


def work_on_paper(read: Mapping[Node, tuple[int, ...]]) -> dict[str, Work]:
    """The work of kernels that are not run."""
    found = {node.name: expected(node, shape) for node, shape in read.items()}
    return {name: work for name, work in found.items() if work is not None}
