"""Program scope: one graph, dynamic sizes, the user's parameters, and clear errors."""

import textwrap

import pytest
import torch
from torch import Tensor, nn

from bitfold.formats.errors import BitfoldError
from bitfold.passes import (
    CaptureError,
    capture,
    constant,
    expression,
    origin,
    snapshot,
    source_parameter,
    state,
)


def text(block: str) -> str:
    return textwrap.dedent(block).strip()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = torch.relu(block(x))
        return x + self.shift, (x if mask is None else x * mask)


def test_the_graph() -> None:
    gm = capture(Net(), torch.zeros(2, 4), dynamic="batch")
    assert str(snapshot(gm)) == text(
        """
        blocks_0_weight: f32[4, 4] = self.blocks.0.weight
        blocks_0_bias: f32[4] = self.blocks.0.bias
        blocks_1_weight: f32[3, 4] = self.blocks.1.weight
        blocks_1_bias: f32[3] = self.blocks.1.bias
        shift: f32[3] = self.shift
        x: f32[s77, 4] = input
        linear: f32[s77, 4] = aten.linear.default(x, blocks_0_weight, blocks_0_bias)
        relu: f32[s77, 4] = aten.relu.default(linear)
        linear_1: f32[s77, 3] = aten.linear.default(relu, blocks_1_weight, blocks_1_bias)
        relu_1: f32[s77, 3] = aten.relu.default(linear_1)
        add: f32[s77, 3] = aten.add.Tensor(relu_1, shift)
        return (add, relu_1)
        """
    )


def test_the_parameters_are_the_user_s() -> None:
    model = Net()
    gm = capture(model, torch.zeros(2, 4))
    assert gm.get_parameter("blocks.1.weight") is model.blocks[1].weight
    (linear, _) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert source_parameter(gm, linear.args[1]) == ("blocks.0.weight", model.blocks[0].weight)
    assert expression(gm, linear.args[0]) is None
    assert constant(gm, linear) is None


def test_every_node_says_where_it_comes_from() -> None:
    gm = capture(Net(), torch.zeros(2, 4))
    at = {node.name: origin(node) for node in gm.graph.nodes}
    assert at["linear_1"].module_path == "blocks.1"
    assert at["linear_1"].where.startswith("test_capture_program.py:")
    assert at["add"].text == "return x + self.shift, (x if mask is None else x * mask)"


@pytest.mark.parametrize(
    "inputs",
    [
        {"inputs": torch.zeros(2, 4), "kwargs": {"mask": torch.zeros(2, 1)}},
        {"inputs": (torch.zeros(2, 4), 2.0), "kwargs": {"mask": torch.zeros(2, 1)}},
        {"inputs": {"x": torch.zeros(2, 4), "mask": torch.zeros(2, 1)}},
        {"inputs": {"x": torch.zeros(1, 4), "mask": torch.zeros(1, 1)}},
    ],
)
def test_inputs_by_position_and_by_name_are_dynamic(inputs: dict[str, object]) -> None:
    model = Net()
    gm = capture(model, **inputs, dynamic="batch")
    x, mask = torch.randn(5, 4), torch.randn(5, 1)
    given = inputs["inputs"]
    positional = (x,) if isinstance(given, Tensor) else (x, 2.0) if isinstance(given, tuple) else ()
    named = {"mask": mask} if positional else {"x": x, "mask": mask}
    for ours, theirs in zip(gm(*positional, **named), model(x, mask=mask), strict=True):
        assert torch.equal(ours, theirs)


def test_dynamic_shapes_as_torch_export_takes_them() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    gm = capture(Net(), (torch.zeros(3, 4),), dynamic={"x": {0: rows}})
    assert gm(torch.zeros(9, 4))[0].shape == (9, 3)


def test_a_size_that_the_model_fixes_is_an_error_not_a_specialization() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(3, 4) + 1

    with pytest.raises(CaptureError, match="Fixed cannot be captured as one program"):
        capture(Fixed(), torch.zeros(3, 4), dynamic="batch")


def test_a_model_that_breaks_says_where_and_what_to_do() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError) as error:
        capture(Branches(), torch.zeros(3, 4))
    assert str(error.value).startswith(
        "Branches cannot be captured as one program, it breaks at test_capture_program.py:"
    )
    assert "`return x if x.sum() > 0 else -x`: " in str(error.value)
    assert "bf.quantize with scope='module'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["class", 'a"b', "a\\"])
def test_a_name_that_python_cannot_spell_is_one_sentence(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 3))
    with pytest.raises(CaptureError) as error:
        capture(model, torch.zeros(3, 4))
    assert str(error.value).startswith(
        f"Sequential cannot be captured as one program: the name {name!r} in it cannot be written as Python"
    )


def test_inputs_that_the_model_does_not_take() -> None:
    model, x = nn.Linear(4, 3), torch.zeros(2, 4)
    with pytest.raises(CaptureError, match="it breaks at missing a required argument: 'input'"):
        capture(model, {"inputs": x})
    with pytest.raises(BitfoldError, match=r"the inputs do not fit Linear\.forward: multiple values for"):
        capture(model, (x,), kwargs={"input": x}, dynamic="batch")


def test_a_model_on_meta_is_captured_too() -> None:
    gm = capture(nn.Linear(4, 3, device="meta"), torch.zeros(2, 4, device="meta"))
    assert "linear: f32[2, 3]" in str(snapshot(gm))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scope": "frame"}, "capture\\(\\) takes scope='program', not 'frame'"),
        ({"dynamic": "bach"}, "dynamic is 'bach'; it may be 'batch', 'sequence', 'batch\\+sequence'"),
        ({"inputs": 3}, "inputs is a int; give a tensor"),
    ],
)
def test_mistakes_get_one_sentence(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(BitfoldError, match=says):
        capture(Net(), **{"inputs": torch.zeros(2, 4), **arguments})


def test_tied_weights_are_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens))

    gm = capture(Tied(), torch.zeros(2, 3, dtype=torch.int64), dynamic="batch+sequence")
    aten = torch.ops.aten
    (table,) = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
    (head,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    found = [source_parameter(gm, node) for node in (table.args[0], head.args[1])]
    assert found[0] is not None and found[1] is not None
    assert found[0][1] is found[1][1]
    assert [origin(node).module_path for node in (table, head)] == ["table", "head"]


def test_what_is_written_to_is_no_constant() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))
            self.register_buffer("fixed", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.count[1:].add_(1)
            return x + self.count + self.fixed

    gm = capture(Counts(), torch.zeros(3))
    at = {node.name: node for node in gm.graph.nodes}
    assert constant(gm, at["count"]) is None
    assert constant(gm, at["fixed"]) is not None


def test_the_state_is_new() -> None:
    here = state(capture(Net(), torch.zeros(2, 4)))
    assert (here.scope, here.stage.name, here.misses, here.path_prefix) == ("program", "captured", [], "")
