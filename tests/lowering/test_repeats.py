"""Layers that repeat are found, compiled once, and give the numbers of the whole graph."""

from __future__ import annotations

import copy
import operator
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import bitfold as bf
from bitfold.lowering import backend
from bitfold.lowering.cpu.repeats import LEAST, Repeat, compile_repeats, repeat
from bitfold.passes.shared_memory import memory, writes_shared

WIDE = 32


class Layer(nn.Module):
    """Eighteen operators, and a buffer that it writes to."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDE, WIDE)
        self.sign = sign
        self.register_buffer("seen", torch.zeros(1, WIDE))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        self.seen.add_(x.detach().mean(0, keepdim=True))
        y = self.inner(x) * self.sign
        for _ in range(3):
            y = (y.sin() + shift).cos() * y
        return x + torch.tanh(y + self.seen)


class Tower(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDE, 5)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, shift = x.exp(), shift + 1
        halfway = x
        for layer in self.layers:
            x = layer(x, shift)
            halfway = x if layer is self.layers[1] else halfway
        return self.head(x), {"halfway": halfway, "shift": shift}


def frame(tower: nn.Module, *inputs: Tensor) -> tuple[GraphModule, list[Tensor]]:
    """The graph that Dynamo hands to a backend, in ATen, and its inputs."""
    found: list[Any] = []

    def keep(gm: GraphModule, examples: list[Tensor]) -> Any:
        from torch._functorch.aot_autograd import aot_module_simplified

        def inner(graph: GraphModule, given: list[Tensor]) -> Any:
            found.append((graph, examples))
            return graph.forward

        return aot_module_simplified(gm, examples, fw_compiler=inner, keep_inference_input_mutations=True)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(tower, backend=keep)(*inputs)
    graph, examples = found[0]
    return graph, [given.detach().clone() for given in examples]


def body(gm: GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]


@pytest.mark.parametrize("count", [3, 5])
def test_each_layer_is_a_stretch(count: int) -> None:
    torch.manual_seed(0)
    gm, _ = frame(Tower([Layer() for _ in range(count)]), torch.randn(4, WIDE), torch.randn(WIDE))
    found = repeat(body(gm))
    assert isinstance(found, Repeat) and found.count == count and found.period >= LEAST
    # The last layer's result, and nothing else of it, goes into the next.
    edges = [found.start + i * found.period for i in range(1, count)]
    for edge in edges:
        before, next_one = set(body(gm)[found.start : edge]), body(gm)[edge : edge + found.period]
        assert len({given for node in next_one for given in node.all_input_nodes if given in before}) == 1


@pytest.mark.parametrize("signs", [(1.0, 1.0), (1.0, 2.0, 1.0, 2.0, 3.0)], ids=str)
def test_what_does_not_repeat_is_left_whole(signs: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    gm, _ = frame(Tower([Layer(sign) for sign in signs]), torch.randn(4, WIDE), torch.randn(WIDE))
    assert repeat(body(gm)) is None
    assert compile_repeats(gm, lambda piece, inputs: piece.forward) is None


def test_pieces_give_what_the_graph_gives_and_one_serves_all_layers() -> None:
    torch.manual_seed(0)
    gm, examples = frame(Tower([Layer() for _ in range(4)]), torch.randn(4, WIDE), torch.randn(WIDE))
    made: list[GraphModule] = []

    def compile(piece: GraphModule, inputs: list[Any]) -> Any:
        made.append(piece)
        assert [node.meta["val"].shape for node in piece.graph.find_nodes(op="placeholder")] == [
            given.shape for given in inputs
        ]
        return piece.forward

    run = compile_repeats(gm, compile)
    assert run is not None and len(made) == 3  # before, a layer, behind
    ours, theirs = ([given.clone() for given in examples] for _ in range(2))
    for _ in range(2):  # what the first call writes to is read by the second
        found, wanted = run(*ours), gm(*theirs)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_compiled_by_the_backend_it_has_the_numbers_of_the_reference() -> None:
    torch.manual_seed(0)
    tower, x, shift = Tower([Layer() for _ in range(4)]).eval(), torch.randn(4, WIDE), torch.randn(WIDE)
    right = Tower([Layer() for _ in range(4)]).eval()
    right.load_state_dict(tower.state_dict())
    torch._dynamo.reset()
    fast = torch.compile(tower, backend=backend.bitfold, options={"recipe": "int8"})
    slow = torch.compile(right, backend=backend.bitfold, options={"recipe": "int8", "target": "reference"})
    with torch.inference_mode():
        for _ in range(3):
            # Sines of what four layers add up: a last bit in the first grows by some tens.
            torch.testing.assert_close(fast(x, shift), slow(x, shift), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(tower.buffers(), right.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_go_by_pieces() -> None:
    """Nothing is cut while grad mode is on: a piece has no backward of its own here."""
    tower = Tower([Layer() for _ in range(3)]).eval()
    bf.quantize(tower, "int8")
    torch._dynamo.reset()
    x, shift = torch.randn(4, WIDE, requires_grad=True), torch.randn(WIDE)
    fast = torch.compile(tower, backend=backend.bitfold, options={"recipe": "none"})
    with pytest.warns(UserWarning, match="unquantized"):
        y, _ = fast(x, shift)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


STATIC = """
import torch, bitfold as bf
from test_repeats import Layer, Tower, WIDE
torch.manual_seed(0)
tower, x, shift = Tower([Layer() for _ in range(4)]).eval(), torch.randn(4, WIDE), torch.randn(WIDE)
bf.quantize(tower, "int8_static", calibration=[(x, shift)])
fast = torch.compile(tower, backend="bitfold", options={"recipe": "none"})
found = []
for run in (tower, fast):
    for layer in tower.layers: layer.seen.zero_()
    with torch.inference_mode(): found.append(run(x, shift)[0])
# A code on the border of two may fall to either side where sums are exact on one side only.
assert (found[1] - found[0]).norm() < 0.05 * found[0].norm(), found
print("the same")
"""


@pytest.mark.skipif(bool(bf.get_target("cpu").missing()), reason="there is no C++ compiler")
def test_layers_with_static_scales_run(tmp_path: Path) -> None:
    """In a process of its own: called from Inductor's C++ through Python, their operator ended it."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *(part for part in sys.path if part)])
    done = subprocess.run(
        [sys.executable, "-c", STATIC],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-2000:]


class Kept(nn.Module):
    """Layers that write to one tensor and read another: the same memory, for those in `shared`."""

    def __init__(self, shared: Sequence[int] = (), stacked: bool = False) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(5))
        self.stacked = stacked
        self.register_buffer("all", torch.zeros(5, WIDE))
        for i in range(5):
            self.register_buffer(f"to{i}", torch.zeros(WIDE))
            self.register_buffer(f"of{i}", getattr(self, f"to{i}")[:] if i in shared else torch.zeros(WIDE))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.all.unbind(0)
        for i, inner in enumerate(self.inner):
            to, of = getattr(self, f"to{i}"), getattr(self, f"of{i}")
            to = rows[i] if self.stacked else to
            to.add_(x.mean(0))
            y = inner(x)
            for _ in range(4):
                y = (y.sin() + (self.all.sum(0) if self.stacked else of)).cos() * y
            x = torch.tanh(x + y)
        return x


@pytest.mark.parametrize(("shared", "stacked"), [((), False), ((3,), False), ((2, 3), False), ((), True)])
def test_memory_that_inputs_share_is_written_where_all_see_it(shared: Sequence[int], stacked: bool) -> None:
    """A layer compiled for inputs apart would read one of them before it wrote to the other."""
    torch.manual_seed(0)
    model = Kept(shared, stacked)
    right = copy.deepcopy(model)
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend.bitfold, options={"recipe": "none"})
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(4, WIDE)
            torch.testing.assert_close(fast(x), right(x), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(model.buffers(), right.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_shares_memory() -> None:
    graph = Graph()
    c, x = graph.placeholder("c"), graph.placeholder("x")
    c.meta["val"], x.meta["val"] = torch.zeros(2, 3), torch.zeros(3)
    rows = graph.call_function(torch.ops.aten.unbind.int, (c,))
    row = graph.call_function(operator.getitem, (rows, 0))
    view = graph.call_function(torch.ops.aten.view.default, (row, [3]))
    copied = graph.call_function(torch.ops.aten.clone.default, (row,))
    written = graph.call_function(torch.ops.aten.add_.Tensor, (view, x))
    found = memory(graph)
    assert found[c] == found[rows] == found[row] == found[view] == found[written]
    assert len({found[c], found[x], found[copied]}) == 3
    assert writes_shared([written], [c, view, x], found) and not writes_shared([written], [view, x], found)
    assert not writes_shared([copied], [c, row], found)
