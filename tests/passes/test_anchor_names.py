"""What a layer is called and which layers are passed over, the same in every scope."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.passes import (
    Annotate,
    Pipeline,
    Recipe,
    Rule,
    annotated,
    capture,
    capture_frame,
    capture_module,
    example_for,
)

TWO = Recipe("two", (Rule(match="0", weight="int8"), Rule(match="1", weight="int4[g16]")))


class Own(nn.Module):
    """A layer of the user's own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def linear() -> nn.Module:
    return nn.Linear(16, 16, bias=False)


def formats(gm: torch.fx.GraphModule, recipe: Recipe) -> dict[str, str | None]:
    Pipeline([Annotate(recipe)]).run(gm)
    return {note.layer: note.weight for _, note in annotated(gm)}


def in_frame(model: nn.Module, x: Tensor, recipe: Recipe) -> dict[str, str | None]:
    found: dict[str, str | None] = {}

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.update(formats(capture_frame(gm, inputs), recipe))
        return gm.forward

    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(model, backend=backend)(x)
    return found


@pytest.mark.parametrize("kind", [linear, Own])
@pytest.mark.parametrize("rules", [TWO.rules, TWO.rules[:1], TWO.rules[1:]])
def test_tied_layers_take_the_rule_of_their_own_path(
    kind: Callable[[], nn.Module], rules: tuple[Rule, ...]
) -> None:
    model, x = nn.Sequential(kind(), kind()), torch.randn(2, 16)
    model[1].weight = model[0].weight
    recipe = Recipe("some", rules)
    wanted = {rule.match: rule.weight for rule in rules}
    assert formats(capture(model, (x,)), recipe) == wanted
    assert in_frame(model, x, recipe) == wanted
    if kind is linear:
        alone = [capture_module(model[int(i)], example_for(model[int(i)]) or (), path=i) for i in "01"]
        assert formats(alone[0], recipe) | formats(alone[1], recipe) == wanted


class Reader(nn.Module):
    """A block that reads the weight of a layer elsewhere."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.held = [other]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.held[0].weight)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 16, bias=False)
        self.block = Reader(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("name", ["shared", "block"])
def test_a_weight_read_by_another_module_goes_by_both_paths(name: str) -> None:
    recipe = Recipe("one", (Rule(match=name, weight="int8"),))
    assert formats(capture(Functional(), (torch.randn(2, 16),)), recipe) == {"block": "int8"}


class Around(nn.Module):
    """One layer in a model, so that it has a path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given: Tensor) -> Any:
        return self.layer(*given)


UNTAKEN: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "lstm": (nn.LSTM(8, 8, num_layers=2), (torch.zeros(3, 2, 8),), "a recurrent layer"),
    "gru": (nn.GRU(8, 8), (torch.zeros(3, 2, 8),), "a recurrent layer"),
    "rnn": (nn.RNN(8, 8, nonlinearity="relu"), (torch.zeros(3, 2, 8),), "a recurrent layer"),
    "lstm cell": (nn.LSTMCell(8, 8), (torch.zeros(2, 8),), "a recurrent layer"),
    "gru cell": (nn.GRUCell(8, 8), (torch.zeros(2, 8),), "a recurrent layer"),
    "rnn cell": (nn.RNNCell(8, 8), (torch.zeros(2, 8),), "a recurrent layer"),
    "bilinear": (nn.Bilinear(4, 4, 4), (torch.zeros(2, 4), torch.zeros(2, 4)), "a bilinear layer"),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("kind", UNTAKEN)
def test_layers_that_are_not_quantized_are_reported(kind: str) -> None:
    layer, inputs, what = UNTAKEN[kind]
    for op in ("*", "linear"):
        recipe = Recipe("all", (Rule(match="layer", op=op, weight="int8"), Rule(op="conv", weight="int8")))
        trace = Pipeline([Annotate(recipe)]).run(capture(Around(layer), inputs))
        found = [(miss.module_path, miss.reason) for miss in trace.misses if miss.module_path]
        assert found == [("layer", f"{what} is not quantized")]
