"""What each node of a graph does: floating-point operations, bytes that it reads and writes, time.

In: a graph and inputs. Out: node name -> `Work`.

    measure(gm, inputs)["linear_5"]   ->   Work(flops=1.9e7, bytes=3.6e6, seconds=2.1e-4)

Operations are counted by torch's own `FlopCounterMode` (products, convolutions, attention; 2 for a
multiplication and an addition), bytes by the tensors: each input and result once, nothing for a result that
shares its input's memory. Times are torch's profiler's: the fastest of several runs, operator by operator.
Inductor fuses what stands between the kernels, so the compiled whole takes less than their sum."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.fx import GraphModule, Interpreter, Node
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from ..codegen import GemmSpec
from ..codegen.conv import ConvSpec
from .held import as_it_was
from .viz.watch import writes

RANGE = "bitfold node "
"""What the profiler calls the range of a node: this and its name."""


@dataclass(frozen=True)
class Work:
    """flops: operations of one call; bytes: read and written; seconds: the fastest call, None if not timed;
    read: the shape of the first tensor that is read, by which kernels choose their schedule."""

    flops: int
    bytes: int
    seconds: float | None = None
    read: tuple[int, ...] = ()


def measure(gm: GraphModule, inputs: Sequence[Any], *, runs: int = 5) -> dict[str, Work]:
    """Run `gm` once to count and `runs` times, after one more to warm up, to time. 0 runs: only counted."""
    counted = _Counted(gm)
    with torch.no_grad(), as_it_was(gm, inputs):
        counted.count(inputs)
        seconds = _timed(gm, inputs, runs) if runs else {}
    return {name: replace(done, seconds=seconds.get(name)) for name, done in counted.found.items()}


def expected(node: Node, read: tuple[int, ...]) -> Work | None:
    """What a generated product will do on an x of this shape, by its text and its graph alone: for a device
    that is not there. None for other nodes."""
    if node.target is not torch.ops.bitfold.fused.default:
        return None
    spec = GemmSpec.parse(str(node.args[1]))
    rows = prod(read) // spec.k
    values = [source.meta.get("val") for source in node.all_input_nodes]
    weights = [source.op == "get_attr" for source in node.all_input_nodes]
    moved = [node.meta["val"][0], *(v for v, held in zip(values, weights, strict=True) if not held)]
    known = sum(v.nbytes for v, held in zip(values, weights, strict=True) if held and isinstance(v, Tensor))
    # Vectors of an epilogue have one row, all else as many as x, in sizes that may vary.
    count = sum((1 if v.ndim == 1 else rows) * int(v.shape[-1]) * v.itemsize for v in moved)
    return Work(2 * rows * spec.n * spec.k * spec.weights, known + count, None, read)


class _Counted(Interpreter):
    """Counts the operations and bytes of each call."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[str, Work] = {}
        self._counter: Any = FlopCounterMode(display=False, custom_mapping=_OURS)

    def count(self, inputs: Sequence[Any]) -> None:
        """Run it, counting."""
        with self._counter:
            self.run(*inputs)

    def run_node(self, n: Node) -> Any:
        if not n.op.startswith("call_"):
            return super().run_node(n)
        given = [self.env[source] for source in n.all_input_nodes]
        before = self._counter.get_total_flops()
        value = super().run_node(n)
        flops = int(self._counter.get_total_flops() - before)
        read = next((tuple(t.shape) for item in given for t in _tensors(item)), ())
        self.found[n.name] = Work(flops, _moved(n, given, value), read=read)
        return value


class Named(Interpreter):
    """Runs each call in a range of the profiler that carries the node's name."""

    def run_node(self, n: Node) -> Any:
        if not n.op.startswith("call_"):
            return super().run_node(n)
        with record_function(RANGE + n.name):
            return super().run_node(n)


@contextmanager
def profiled(cuda: bool) -> Iterator[Any]:
    """Torch's profiler, without the lines that it writes to the terminal (unless the user asks for them)."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            yield found
    finally:
        if before is None:
            del os.environ[name]


def _timed(gm: GraphModule, inputs: Sequence[Any], runs: int) -> dict[str, float]:
    cuda = any(given.is_cuda for given in inputs if isinstance(given, Tensor))
    Named(gm).run(*inputs)
    with profiled(cuda) as found:
        for _ in range(runs):
            Named(gm).run(*inputs)
    times: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        # The range appears a second time on the GPU's own line, where it has no children.
        if event.name.startswith(RANGE) and event.device_type == DeviceType.CPU:
            micro = event.device_time_total if cuda else event.cpu_time_total
            times[event.name.removeprefix(RANGE)].append(micro * 1e-6)
    return {name: min(values) for name, values in times.items()}


def _moved(node: Node, given: Sequence[Any], value: Any) -> int:
    """Bytes of inputs and results. What only looks at its input's memory in another way moves none."""
    inputs = list({id(t): t for item in given for t in _tensors(item)}.values())
    results = _tensors(value)
    owned = {t.untyped_storage().data_ptr() for t in inputs}
    if results and all(t.untyped_storage().data_ptr() in owned for t in results) and not writes(node):
        return 0
    return sum(t.nbytes for t in (*inputs, *results))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _fused(inputs: Sequence[Any], text: str, *_: Any, **__: Any) -> int:
    spec = GemmSpec.parse(text)
    rows = prod(inputs[0]) // spec.k
    return int(2 * rows * spec.n * spec.k * spec.weights)


def _conv(_: Any, text: str, *, out_shape: Any, **__: Any) -> int:
    return int(2 * prod(out_shape[0]) * ConvSpec.parse(text).products)


# The operators of lowered graphs, by the texts that they carry; the rest torch knows.
_OURS: dict[Any, Any] = {torch.ops.bitfold.fused: _fused, torch.ops.bitfold.conv: _conv}
