"""Modules with a forward of their own, in module scope: traced with what they get, or left and reported."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf


class Table(nn.Module):
    """A module of a kind that is not known: its weight is [K, N], as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 48))
        self.bias = nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 48)


def test_unknown_kinds_are_traced_with_what_they_get() -> None:
    model = nn.Sequential(nn.LayerNorm(64), Table(), nn.Linear(48, 8))
    expected = copy.deepcopy(model)
    fmt = bf.format("int8")
    with torch.no_grad():
        expected[1].weight.copy_(fmt.dequantize(fmt.quantize(expected[1].weight.t().contiguous())).t())
        expected[2].weight.copy_(fmt.dequantize(fmt.quantize(expected[2].weight)))
    x = torch.randn(2, 3, 64)
    bf.quantize(model, "int8", example_inputs=x, target="reference")
    assert isinstance(model[1], Table) and model[1].codes.shape == (48, 64)
    assert torch.equal(model[1].weight, expected[1].weight)
    # The reference multiplies by a transposed view, so the sums of 64 products come in another order.
    for given in (x, x[:, :1]):
        torch.testing.assert_close(model(given), expected(given), rtol=1e-4, atol=64 * 2**-23 * 16)
    with pytest.raises(bf.BitfoldError, match=r"traced with inputs of \[3\] dimensions"):
        model(x[0])


def test_unknown_kinds_without_data_are_reported() -> None:
    model = nn.Sequential(Table(), nn.Linear(48, 8))
    bf.quantize(model, "int8", target="reference")
    (miss,) = bf.report(model).misses
    assert miss.module_path == "0" and "give example_inputs" in miss.reason


class Scaled(nn.Embedding):
    """A kind that is known, with a forward of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 3


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(x.shape[0], -1))


class Odd(nn.Linear):
    def forward(self, x: Tensor, times: int) -> Tensor:  # type: ignore[override]
        return super().forward(x) * times


def test_known_kinds_with_a_forward_of_their_own() -> None:
    kinds = {"table": Scaled(50, 64), "twofold": Doubled(64, 8), "odd": Odd(64, 8), "flat": Flat(64, 8)}
    model = nn.ModuleDict(kinds)
    expected, fmt = copy.deepcopy(model), bf.format("int8")
    with torch.no_grad():
        for weight in (expected["table"].weight, expected["twofold"].weight):
            weight.copy_(fmt.fake_quantize(weight))
    bf.quantize(model, "int8_all", target="reference")
    tokens = torch.randint(0, 50, (2, 5))
    assert torch.equal(model["table"](tokens), expected["table"](tokens))
    for shape in ((64,), (3, 64), (2, 3, 64)):
        x = torch.randn(shape)
        assert torch.equal(model["twofold"](x), expected["twofold"](x))
    odd, flat = bf.report(model).misses
    assert odd.module_path == "odd" and type(model["odd"]) is Odd
    assert flat.module_path == "flat" and "give example_inputs" in flat.reason


class Branching(Table):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1 if x.shape[0] > 5 else x)


def test_a_forward_that_looks_at_sizes_is_left_alone() -> None:
    model = nn.Sequential(Branching(), nn.Linear(48, 8))
    bf.quantize(model, "int8", example_inputs=torch.randn(2, 3, 64), target="reference")
    (miss,) = bf.report(model).misses
    assert "goes another way for other sizes" in miss.reason and type(model[0]) is Branching


def test_a_reparametrized_weight_is_left_alone() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 48)), nn.Linear(48, 8))
    x = torch.randn(2, 64)
    model[1].requires_grad_(False)
    bf.quantize(model, "int8", target="reference")
    assert bf.report(model).misses[0].module_path == "0"
    assert len(bf.report(model).layers) == 1
    model(x).sum().backward()
