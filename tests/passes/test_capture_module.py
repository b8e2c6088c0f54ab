"""Module scope: one module alone, its parameters shared, sizes open."""

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from bitfold.formats.errors import BitfoldError
from bitfold.passes import capture_module, example_for, origin, snapshot, source_parameter, state

KINDS = {
    "linear": (
        lambda: nn.Linear(4, 3),
        [(5, 4), (2, 3, 4), (4,)],
        "linear: f32[s, 3] = aten.linear.default(x, weight, bias)",
    ),
    "linear without bias": (
        lambda: nn.Linear(4, 3, bias=False),
        [(5, 4), (2, 3, 4)],
        "linear: f32[s, 3] = aten.linear.default(x, weight)",
    ),
    "conv1d": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        [(2, 4, 9), (1, 4, 8)],
        "conv1d: f32[s, 6, s] = aten.conv1d.default(x, weight, bias, [2], [1], [1], 2)",
    ),
    "conv2d": (
        lambda: nn.Conv2d(3, 4, (3, 5), dilation=2, padding="same"),
        [(2, 3, 9, 11), (1, 3, 16, 20)],
        "conv2d: f32[s, 4, s, s] = aten.conv2d.padding(x, weight, bias, [1, 1], 'same', [2, 2])",
    ),
    "embedding": (
        lambda: nn.Embedding(7, 4, padding_idx=0),
        [(5,), (2, 3)],
        "embedding: f32[s, s, 4] = aten.embedding.default(weight, x, 0)",
    ),
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = KINDS[kind][0]()
    return module


def anonymous(text: str) -> str:
    """The text with every symbolic size called `s`."""
    import re

    return re.sub(r"(?<=[\[ ])[^\[\],]*s\d+[^\[\],]*", "s", text)


@pytest.mark.parametrize("kind", KINDS)
def test_known_kinds_are_traced_from_their_own_sizes(kind: str) -> None:
    module = make(kind)
    args = example_for(module)
    assert args is not None
    gm = capture_module(module, args, path="block.0.layer")
    shown = [anonymous(str(node)) for node in snapshot(gm) if node.op == "call_function"]
    assert shown == [KINDS[kind][2]]
    for shape in KINDS[kind][1]:
        x = torch.randint(0, 7, shape) if kind == "embedding" else torch.randn(shape)
        assert torch.equal(gm(x), module(x))


def test_the_parameters_are_shared_and_known_by_their_path_in_the_model() -> None:
    module = make("linear")
    gm = capture_module(module, (torch.zeros(2, 4),), path="block.0.fc")
    (linear,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert source_parameter(gm, linear.args[1]) == ("block.0.fc.weight", module.weight)
    assert dict(gm.named_parameters())["weight"] is module.weight
    assert (state(gm).scope, state(gm).path_prefix) == ("module", "block.0.fc")


def test_a_module_of_modules() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
            self.gate = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.relu(x @ self.gate) * self.up(x)
            return self.down(hidden) * scale, hidden

    module = Gated()
    gm = capture_module(module, (torch.zeros(2, 3, 4), torch.zeros(1)), path="mlp")
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    paths = [found[0] for node in linears if (found := source_parameter(gm, node.args[1]))]
    assert paths == ["mlp.gate", "mlp.up.weight", "mlp.down.weight"]
    assert [origin(node).module_path for node in linears] == ["", "up", "down"]
    assert origin(linears[0]).text == "hidden = torch.relu(x @ self.gate) * self.up(x)"
    x, scale = torch.randn(5, 2, 4), torch.randn(1)
    for ours, theirs in zip(gm(x, scale), module(x, scale), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_subclass_with_its_own_forward_is_traced_as_it_is() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    cache: dict = {}
    plain, doubled = nn.Linear(4, 3), Doubled(4, 3)
    for module in (plain, doubled):
        gm = capture_module(module, (torch.zeros(2, 4),), path="fc", cache=cache)
        x = torch.randn(5, 4)
        assert torch.equal(gm(x), module(x))
    assert len(cache) == 1


def test_cached_graphs_are_copies() -> None:
    cache: dict = {}
    first, second = make("linear"), nn.Linear(4, 3)
    graphs = [
        capture_module(module, (torch.zeros(2, 4),), path="fc", cache=cache) for module in (first, second)
    ]
    assert len(cache) == 1
    x = torch.randn(5, 4)
    for gm, module in zip(graphs, (first, second), strict=True):
        assert torch.equal(gm(x), module(x))
        assert gm.weight is module.weight
    graphs[0].graph.erase_node(graphs[0].graph.output_node())
    assert len(graphs[1].graph.nodes) == 5


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(4, 3, bias=False),
        nn.Linear(5, 3),
        nn.Linear(4, 3, dtype=torch.float64),
        nn.Linear(4, 3).requires_grad_(False),
    ],
)
def test_another_kind_is_traced_anew(other: nn.Linear) -> None:
    cache: dict = {}
    for module in (make("linear"), other):
        capture_module(module, example_for(module), path="fc", cache=cache)
    assert len(cache) == 2


def test_kinds_that_are_not_known_need_inputs() -> None:
    assert example_for(nn.LSTM(4, 4)) is None
    assert example_for(nn.ReLU()) is None
    gm = capture_module(nn.LSTM(4, 5), (torch.zeros(2, 3, 4),), path="lstm")
    assert gm(torch.zeros(2, 3, 4))[0].shape == (2, 3, 5)


def test_a_batch_of_one_in_the_example_does_not_fix_the_batch() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x.reshape(x.shape[0] * x.shape[1], 4) @ self.w.t()).view(x.shape[0], x.shape[1], 3)

    module = Flat()
    gm = capture_module(module, (torch.zeros(1, 2, 4),), path="flat")
    for shape in ((1, 2, 4), (5, 3, 4), (2, 2, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(gm(x), module(x))


def test_a_module_that_cannot_be_traced_is_named() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(BitfoldError, match=r"'block\.0\.gate' \(Branches\) cannot be traced alone") as error:
        capture_module(Branches(), (torch.zeros(2, 4),), path="block.0.gate")
    assert "\n" not in str(error.value)


def test_a_deep_copy_has_its_own_parameters() -> None:
    module = make("linear")
    gm = capture_module(module, (torch.zeros(2, 4),), path="fc")
    twin = copy.deepcopy(gm)
    assert twin.weight is not module.weight
    assert torch.equal(twin(torch.ones(2, 4)), module(torch.ones(2, 4)))


@pytest.mark.slow
def test_the_layers_of_a_model_are_captured_in_no_time() -> None:
    layers = [nn.Linear(8, 8) for _ in range(210)]
    cache: dict = {}
    started = time.perf_counter()
    for index, layer in enumerate(layers):
        capture_module(layer, example_for(layer), path=f"layers.{index}", cache=cache)
    assert time.perf_counter() - started < 2
