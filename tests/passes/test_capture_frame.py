"""Frame scope: what a torch.compile backend gets, as normalized ATen."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.passes import (
    capture_frame,
    constant,
    is_training_graph,
    origin,
    snapshot,
    source_parameter,
    state,
)


class Backend:
    """Captures every frame and runs the capture eagerly."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.training: list[bool] = []

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.training.append(is_training_graph(inputs))
        self.graphs.append(capture_frame(gm, inputs))
        return self.graphs[-1].forward


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.w = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) @ self.w + self.shift + torch.ones(5)


def linear_paths(gm: GraphModule) -> list[str]:
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [parameter[0] for node in found if (parameter := source_parameter(gm, node.args[1]))]


def test_the_graph() -> None:
    torch.manual_seed(0)
    model, seen = Net(), Backend()
    compiled = torch.compile(model, backend=seen, dynamic=True, fullgraph=True)
    with torch.inference_mode():
        for rows in (2, 7, 31):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(compiled(x), model(x))
    (gm,) = seen.graphs
    shown = [str(node) for node in snapshot(gm) if node.op != "placeholder"]
    size = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0].meta["val"].shape[0]
    names = {path: name for name, path in state(gm).param_paths.items()}
    assert shown == [
        f"linear: f32[{size}, 3] = aten.linear.default(l_x_, {names['fc.weight']}, {names['fc.bias']})",
        f"relu: f32[{size}, 3] = aten.relu.default(linear)",
        f"t: f32[5, 3] = aten.t.default({names['w']})",
        f"linear_1: f32[{size}, 5] = aten.linear.default(relu, t)",
        f"add: f32[{size}, 5] = aten.add.Tensor(linear_1, {names['shift']})",
        "ones: f32[5] = aten.ones.default([5], device=device(type='cpu'), pin_memory=False)",
        f"add_1: f32[{size}, 5] = aten.add.Tensor(add, ones)",
        "return (add_1,)",
    ]


def test_parameters_are_the_user_s_own_tensors_by_their_paths() -> None:
    model, seen = Net(), Backend()
    with torch.inference_mode():
        torch.compile(model, backend=seen)(torch.randn(2, 4))
    (gm,) = seen.graphs
    here = state(gm)
    assert here.scope == "frame"
    held = {path: here.params[name] for name, path in here.param_paths.items()}
    assert held.keys() == {"fc.weight", "fc.bias", "w", "shift"}
    assert held["fc.weight"] is model.fc.weight and held["w"] is model.w
    linear = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[1]
    assert source_parameter(gm, linear.args[1]) == ("w", model.w)
    value = constant(gm, linear.args[1])
    assert value is not None and torch.equal(value, model.w.t())
    assert origin(linear.prev.prev.prev).where.startswith("test_capture_frame.py:")


def test_module_paths_do_not_depend_on_how_the_model_is_reached() -> None:
    model, seen = nn.Sequential(nn.ModuleDict({"a": Net()})["a"], nn.Linear(5, 2)), Backend()
    with torch.inference_mode():
        torch.compile(lambda x: model(x) * 2, backend=seen, fullgraph=True)(torch.randn(2, 4))
        torch.compile(model, backend=seen, fullgraph=True)(torch.randn(2, 4))
    for gm in seen.graphs:
        assert sorted(state(gm).param_paths.values()) == [
            "0.fc.bias", "0.fc.weight", "0.shift", "0.w", "1.bias", "1.weight",
        ]  # fmt: skip
        linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        assert [origin(node).module_path for node in linears] == ["0.fc", "0", "1"]


def test_a_training_graph_has_grad_mode_and_something_that_wants_it() -> None:
    def graph_of(model: nn.Module, x: Tensor) -> bool:
        seen = Backend()
        torch._dynamo.reset()
        torch.compile(model, backend=seen)(x)
        return seen.training[0]

    x = torch.randn(2, 4)
    assert graph_of(Net(), x)
    assert not graph_of(Net().requires_grad_(False), x)
    assert graph_of(Net().requires_grad_(False), x.clone().requires_grad_())
    with torch.no_grad():
        assert not graph_of(Net(), x)


def test_a_frame_trains() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 4)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend=Backend())(x).sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_sizes_that_the_frame_reads_stay_symbolic() -> None:
    def flat(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.reshape(x.shape[0] * x.shape[1], -1), w).view(x.shape[0], x.shape[1], -1)

    seen, w = Backend(), torch.randn(8, 4)
    compiled = torch.compile(flat, backend=seen, dynamic=True, fullgraph=True)
    for rows, columns in ((2, 3), (5, 7), (9, 2)):
        x = torch.randn(rows, columns, 4)
        torch.testing.assert_close(compiled(x, w), flat(x, w))
    assert len(seen.graphs) == 1  # no guard was added, so nothing was compiled again


def test_a_constant_of_the_frame_is_held_by_the_graph() -> None:
    table = torch.arange(4.0)

    root = nn.Module()
    root.register_buffer("held", table)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.add, (x, graph.get_attr("held"))),))
    gm = capture_frame(GraphModule(root, graph), [torch.zeros(2, 4)])
    assert torch.equal(gm(torch.ones(2, 4))[0], table + 1 + torch.zeros(2, 4))
    assert gm.held is table


def test_a_checkpoint_that_saves_nothing_is_in_line() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)
            return out

    model, seen, x = Checkpointed(), Backend(), torch.randn(2, 4)
    with torch.no_grad():
        out = torch.compile(model, backend=seen, fullgraph=True)(x)
    assert torch.equal(out, model(x))
    assert linear_paths(seen.graphs[0]) == ["fc.weight"]


def test_a_subgraph_that_is_compiled_once_is_in_line() -> None:
    region = torch.compiler.nested_compile_region(lambda layer, x: torch.relu(layer(x)))

    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = region(layer, x)
            return x

    model, seen, x = Regions(), Backend(), torch.randn(2, 4)
    with torch.no_grad():
        out = torch.compile(model, backend=seen, fullgraph=True)(x)
    assert torch.equal(out, model(x))
    assert linear_paths(seen.graphs[0]) == ["layers.0.weight", "layers.1.weight"]


def test_a_branch_in_the_graph_is_kept_and_its_weights_reported() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x) * 2, (x,))
            return out

    model, seen = Branches(), Backend()
    with torch.no_grad():
        compiled = torch.compile(model, backend=seen, fullgraph=True)
        for x in (torch.ones(2, 4), -torch.ones(2, 4)):
            assert torch.equal(compiled(x), model(x))
    assert [miss.reason for miss in state(seen.graphs[0]).misses] == [
        "the weight 'a.weight' is used inside a 'cond' block, which stays as it is",
        "the weight 'b.weight' is used inside a 'cond' block, which stays as it is",
    ]


def test_in_place_updates_of_inputs_are_kept() -> None:
    def step(x: Tensor, cache: Tensor) -> Tensor:
        cache.index_copy_(0, torch.tensor([1]), x)
        return cache * 2

    seen, cache = Backend(), torch.zeros(3, 4)
    x = torch.ones(1, 4)
    out = torch.compile(step, backend=seen, fullgraph=True)(x, cache)
    assert torch.equal(cache[1], torch.ones(4))
    assert torch.equal(out, cache * 2)
