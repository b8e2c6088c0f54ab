"""Edges that hold the same numbers, and what is put together, agree on a scale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes import Annotate, Pipeline, Recipe, Rule, calibrate, capture
from bitfold.passes.observing import kinds
from bitfold.passes.observing.observers import MinMax
from bitfold.passes.stages import find_attribute

RULE = {"op": "linear|conv", "weight": "int8", "input": "int8[tensor]"}


class Moves(nn.Module):
    """One value, read as an image and as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return self.conv(y).sum() + self.fc(y.permute(0, 2, 3, 1).flatten(1))


class Joins(nn.Module):
    """Two branches of very different size, concatenated; and two that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.d, self.e = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        small, large = torch.relu(self.a(x)), 30 * torch.relu(self.b(x))
        whole = self.c(torch.cat([small, large], 1))
        return whole + self.d(small) + self.e(large + x)


def scales(model: nn.Module, x: Tensor, passes: str, observer: str = "minmax") -> dict[str, float]:
    """By layer: the static scale of its input after folding."""
    gm = capture(model.eval(), (x,))
    recipe = Recipe("r", (Rule("*", **RULE, observer=observer),))
    Pipeline([Annotate(recipe=str(recipe))]).run(gm)
    Pipeline.parse(passes).run(gm)
    calibrate(gm, [(x,), (x * 0.5,)])
    Pipeline.parse("fold").run(gm)
    found = {}
    for node in gm.graph.nodes:
        if node.target is torch.ops.bitfold.quantize.default:
            name = str(node.args[2][0].target)
            value = find_attribute(gm, name)
            assert isinstance(value, Tensor)
            found[name.removesuffix("_input_scales")] = float(value)
    return found


X = torch.randn(2, 4, 4, 4)


@pytest.mark.parametrize("observer", ["minmax", "average", "moving", "percentile", "mse", "entropy"])
def test_the_same_numbers_have_one_scale(observer: str) -> None:
    found = scales(Moves(), X, "observe,share", observer)
    assert found["conv"] == found["fc"]


def test_what_is_concatenated_has_the_scale_of_the_whole() -> None:
    model = Joins()
    alone, shared = scales(model, X, "observe"), scales(model, X, "observe,share")
    assert alone["d"] < alone["c"]
    assert shared["c"] == shared["d"] == alone["c"]
    # The sum of the large branch and x is something else, and so is the input of a and b.
    assert (shared["e"], shared["a"]) == (alone["e"], alone["a"])


def test_operands_of_an_addition_agree_if_asked() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = 5 * x
            return self.a(x) + self.b(y) + (x + y)

    model = Sum()
    alone, asked = scales(model, X, "observe,share"), scales(model, X, "observe,share{add=true}")
    assert alone["b"] == pytest.approx(5 * alone["a"])
    assert asked["a"] == asked["b"] == alone["b"]


def test_a_concatenation_that_nobody_rounds_leaves_its_parts_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = 5 * x
            return torch.cat([x, y]).sum() + self.a(x) + self.b(y)

    model = Both()
    assert scales(model, X, "observe,share") == scales(model, X, "observe")


def test_the_number_of_rewrites_and_the_need_of_observers() -> None:
    gm = capture(Joins().eval(), (X,))
    with pytest.raises(bf.BitfoldError, match="share"):
        Pipeline.parse("share").run(gm)
    Pipeline([Annotate(recipe="int8_static")]).run(gm)
    steps = Pipeline.parse("observe,share").run(gm).steps
    assert [step.rewrites for step in steps[-2:]] == [4, 1]


class Chain(nn.Module):
    """Branches of convolutions into a concatenation, as in an Inception or a DenseNet block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.join, self.fc = nn.Conv2d(56, 16, 1), nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        joined = torch.cat([x, torch.relu(self.one(x)), torch.relu(self.two(x))], 1)
        return self.fc(torch.relu(self.join(joined)).flatten(1))


@pytest.mark.skipif(bool(bf.get_target("cpu").missing()), reason="there is no C++ compiler")
def test_codes_are_concatenated_on_the_cpu() -> None:
    model, data = Chain().eval(), [torch.randn(4, 3, 4, 4) for _ in range(4)]
    made: dict[str, Callable[..., Any]] = {
        target: bf.quantize(
            model, "int8_static", scope="program", example_inputs=(data[0],), calibration=data, target=target
        )
        for target in ("reference", "cpu")
    }
    graph = made["cpu"].graph  # type: ignore[attr-defined]
    (joint,) = (node for node in graph.nodes if node.target is torch.ops.aten.cat.default)
    assert {part.meta["val"].dtype for part in joint.all_input_nodes} == {torch.uint8}
    # The only rounding outside of a kernel is that of the image.
    outside = [node for node in graph.nodes if node.target is torch.ops.bitfold.quantize.default]
    assert len(outside) == 1
    one, other = made["reference"](data[1]), made["cpu"](data[1])
    # Sums are exact there and rounded here; a number on the border of two codes may fall to either side.
    assert float((one - other).norm() / one.norm()) < 0.02
    assert float((model(data[1]) - other).norm() / one.norm()) < 0.05


def test_an_observer_of_its_own_makes_the_agreed_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    class Power(MinMax):
        def params(self, fmt: bf.Format) -> tuple[Tensor, ...]:
            scale, *rest = super().params(fmt)
            return (scale.log2().ceil().exp2(), *rest)

    monkeypatch.setitem(kinds._registered, "power", Power)
    torch.manual_seed(0)
    found = scales(Moves(), torch.randn(2, 4, 4, 4), "observe,share", "power")
    assert found["conv"] == found["fc"] and float(torch.tensor(found["conv"]).log2()).is_integer()
