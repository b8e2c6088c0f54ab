"""Time of the pass pipeline against the number of nodes: it has to grow in a straight line.

Comes in: sizes and a pipeline's text. Goes out: a table, and `results/pipeline_scaling.json`.

    python benchmarks/pipeline_scaling.py --nodes 1000 50000 --pipeline "annotate{recipe=int8},fold,fuse"

The model is synthetic: residual blocks of a linear layer, an activation and a scaling by one shared constant,
so that the graph has many small weights and one constant with very many users. Weights are 16 x 16: what is
timed is the handling of nodes, not arithmetic on weights. Each size runs in fresh objects; the best of
`--repeat` counts. The exponent is of the processor's time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import time
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bitfold.passes import Pipeline, State, inherit

aten = torch.ops.aten

WIDTH = 16
NODES_PER_BLOCK = 6  # weight, bias, linear, relu, mul, add
DEFAULT = "normalize,annotate{recipe=int8},fold,fold_constants,fuse,eliminate_dead"


def synthetic(nodes: int) -> GraphModule:
    """A captured graph with about this many nodes."""
    blocks = max(1, nodes // NODES_PER_BLOCK)
    root, graph, mode = nn.Module(), Graph(), FakeTensorMode(shape_env=ShapeEnv())
    value = mode.from_tensor(torch.zeros(4, WIDTH))

    def attribute(name: str, tensor: torch.Tensor) -> Node:
        root.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        node = graph.create_node("get_attr", name, (), {}, name=name)
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        return inherit(node, [node])

    def call(target: object, *args: object) -> Node:
        node = graph.call_function(target, args)
        node.meta["val"] = value
        node.meta["nn_module_stack"] = {"block": (f"blocks.{block}", "Block")}
        node.meta["stack_trace"] = f'File "model.py", line {10 + len(args)}, in forward\n    block\n'
        return node

    block = 0
    x = graph.placeholder("x")
    x.meta["val"] = value
    scale = attribute("scale", torch.rand(WIDTH))
    for block in range(blocks):
        weight = attribute(f"weight_{block}", torch.rand(WIDTH, WIDTH))
        bias = attribute(f"bias_{block}", torch.rand(WIDTH))
        hidden = call(aten.relu.default, call(aten.linear.default, x, weight, bias))
        x = call(aten.add.Tensor, x, call(aten.mul.Tensor, hidden, scale))
    graph.output(x)
    gm = GraphModule(root, graph)
    gm.meta["bitfold"] = State("program")
    return gm


def measure(nodes: int, pipeline: Pipeline, repeat: int) -> dict[str, object]:
    """The best time of the whole run and of each pass, in seconds."""
    best: dict[str, object] = {}
    for _ in range(repeat):
        gm = synthetic(nodes)
        count = len(gm.graph.nodes)
        gc.collect()
        started, worked = time.perf_counter(), time.process_time()
        trace = pipeline.run(gm)
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        passes = {step.name: round(step.seconds, 4) for step in trace.steps[1:]}
        if not best or cpu < float(str(best["cpu_seconds"])):
            best = {
                "nodes": count,
                "seconds": round(seconds, 4),
                "cpu_seconds": round(cpu, 4),
                "passes": passes,
            }
    return best


def exponent(rows: list[dict[str, object]]) -> float:
    """The slope of log(cpu_seconds) over log(nodes) by least squares: 1 is linear, 2 is quadratic."""
    points = [(math.log(float(str(row["nodes"]))), math.log(float(str(row["cpu_seconds"])))) for row in rows]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 2000, 5000, 10000, 20000, 50000])
    parser.add_argument("--pipeline", default=DEFAULT, help=f"default: {DEFAULT}")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "pipeline_scaling.json"
    )
    given = parser.parse_args()

    pipeline = Pipeline.parse(given.pipeline)
    rows = []
    measure(given.nodes[0], pipeline, 1)  # imports and caches
    print(f"{'nodes':>8}  {'seconds':>8}  {'cpu':>8}  {'cpu ms a node':>13}")
    for nodes in given.nodes:
        row = measure(nodes, pipeline, given.repeat)
        rows.append(row)
        rate = 1000 * float(str(row["cpu_seconds"])) / int(str(row["nodes"]))
        print(f"{row['nodes']:>8}  {row['seconds']:>8}  {row['cpu_seconds']:>8}  {rate:>13.3f}", flush=True)
    result = {
        "pipeline": str(pipeline),
        "verified": True,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "exponent": round(exponent(rows), 3) if len(rows) > 1 else None,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"time grows as nodes to the power {result['exponent']}; written to {given.out.name}")


if __name__ == "__main__":
    main()
