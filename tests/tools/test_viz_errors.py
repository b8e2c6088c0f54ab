"""Errors per node: known noise gives the known figure, an unchanged graph gives none, regions too."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from bitfold.formats import format
from bitfold.formats.errors import BitfoldError
from bitfold.passes.annotate import Annotate
from bitfold.passes.pipeline import Pipeline
from bitfold.passes.scopes.program import capture
from bitfold.tools.viz import NodeError, node_errors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        masked = hidden.masked_fill(hidden < 0.1, -torch.inf)
        return self.down(hidden) + torch.softmax(masked, -1)[:, :32]


INT8 = format("int8")
X = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)),)


def test_equal_graphs_have_no_error_anywhere() -> None:
    gm = capture(Net().eval(), X)
    errors = node_errors(gm, copy.deepcopy(gm), X)
    assert {"linear", "relu", "masked_fill", "softmax", "linear_1"} <= set(errors)
    for name, error in errors.items():
        assert error == NodeError(math.inf, 0.0, 0.0, name, math.inf), (
            "infinities that are equal are no error"
        )


def test_a_known_change_gives_the_known_figure() -> None:
    before = capture(nn.Linear(64, 64, bias=False).eval(), X)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.weight.mul_(1.01)  # every value is 1% too large: 20 log10(100) = 40 dB
    error = node_errors(before, after, X)["linear"]
    assert error.sqnr_db == pytest.approx(40.0, abs=1e-3)  # float32 rounds 1.01 x to 6e-8: 5e-5 dB
    assert error.max_rel == pytest.approx(0.01, rel=1e-4)


def test_finer_formats_have_smaller_errors() -> None:
    before = capture(Net().eval(), X)
    figures = {}
    for recipe in ("int4[g32]", "int8"):
        after = copy.deepcopy(before)
        Pipeline((Annotate(recipe=recipe), *Pipeline.parse("fold").passes)).run(after)
        figures[recipe] = node_errors(before, after, X)["linear"].sqnr_db
    assert 12 < figures["int4[g32]"] < figures["int8"] - 15, (
        figures
    )  # 4 bits more are 24 dB, less for coarser groups


def test_a_region_is_compared_by_its_last_value_and_inside() -> None:
    before = capture(Net().eval(), X)
    after = copy.deepcopy(before)
    Pipeline.parse("annotate{recipe=int8},fold,fuse").run(after)
    errors = node_errors(before, after, X)
    assert errors["fused_up"].reference == "relu" and errors["fused_up"].sqnr_db > 25
    assert errors["linear"].reference == "linear", "the operation inside the region"


def test_an_isolated_error_is_the_nodes_own() -> None:
    """Two layers, the first 1 % off: the second is as wrong as the first, and by itself not at all."""
    before = capture(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2))).eval(), X)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_parameter("0.weight").mul_(1.01)
    errors = node_errors(before, after, X)
    first, second = errors["linear"], errors["linear_1"]
    assert first.isolated_db == first.sqnr_db == pytest.approx(40.0, abs=1e-3)
    assert second.sqnr_db == pytest.approx(40.0, abs=1e-3) and second.isolated_db == math.inf


@pytest.mark.parametrize("passes", ["fold", "fold,fuse", "fold,fuse,lower{target=cpu}"])
def test_an_isolated_error_holds_the_layers_own_rounding_of_weight_and_input(passes: str) -> None:
    """By hand: the second layer on codes, on the reference's x. 0.1 dB: kernels sum integers, and in another
    order than torch, where the noise that is compared lies 45 dB below."""
    before = capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), X)
    after = copy.deepcopy(before)
    Pipeline.parse(f"annotate{{recipe=int8_dynamic}},{passes}").run(after)
    hidden = torch.relu(
        nn.functional.linear(X[0], before.get_parameter("0.weight"), before.get_parameter("0.bias"))
    )
    weight, bias = before.get_parameter("2.weight"), before.get_parameter("2.bias")
    exact = nn.functional.linear(hidden, weight, bias)
    rounded = nn.functional.linear(*(INT8.dequantize(INT8.quantize(v)) for v in (hidden, weight)), bias)
    by_hand = 10 * math.log10(exact.square().sum() / (rounded - exact).square().sum())
    (error, *_) = [e for e in node_errors(before, after, X).values() if e.reference == "linear_1"]
    assert error.isolated_db == pytest.approx(by_hand, abs=0.1)


def test_dropout_is_no_error_and_random_numbers_go_on_from_where_they_were() -> None:
    """In train mode both graphs drop the same values, also where a node is reckoned a second time."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 32))
    before, after = capture(model, X), capture(model, X)
    Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=reference}").run(after)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    errors = node_errors(before, after, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert errors["dropout"].isolated_db == math.inf
    assert min(error.sqnr_db for error in errors.values()) > 30.0  # int8; other values dropped: near 0 dB


def test_not_a_number_is_said() -> None:
    before = capture(nn.Linear(64, 64, bias=False).eval(), X)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.weight.fill_(torch.nan)
    assert node_errors(before, after, X)["linear"].as_json()["sqnr_db"] == "NaN"


def test_graphs_of_different_models_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(BitfoldError, match="take 1 and 2 inputs; capture the reference from the same model"):
        node_errors(capture(Net().eval(), X), capture(Two(), (X[0], X[0])), X)
