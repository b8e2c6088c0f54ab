"""Modules that do unusual things with their weights, their forward or their names: right, or said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf


class Own(nn.Module):
    """One square weight, and whatever forward a test gives it."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32)) if weight is None else weight
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.w)


def rounded(weight: Tensor) -> Tensor:
    return bf.format("int8").fake_quantize(weight.detach().contiguous())


def through_a_file(model: nn.Module, skeleton: nn.Module, tmp_path: Path) -> nn.Module:
    bf.save(model, tmp_path / "model.safetensors")
    loaded = bf.load(tmp_path / "model.safetensors", into=skeleton, target="reference")
    assert isinstance(loaded, nn.Module)
    return loaded


def test_a_parameter_read_as_weight_and_as_float(tmp_path: Path) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) + w[0] * 100

    model, x = Own(run), torch.randn(2, 32)
    w = model.w.detach().clone()
    expected = F.linear(x, rounded(w)) + w[0] * 100
    bf.quantize(model, "int8", example_inputs=(x,), target="reference")
    assert torch.equal(model(x), expected) and torch.equal(model.w, w)
    assert torch.equal(through_a_file(model, Own(run), tmp_path)(x), expected)


def test_modules_that_read_different_slices_of_one_parameter(tmp_path: Path) -> None:
    def top(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w[:16])

    def bottom(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w[16:])

    def pair() -> nn.ModuleList:
        shared = nn.Parameter(torch.randn(32, 32))
        return nn.ModuleList([Own(top, shared), Own(bottom, shared), Own(bottom, shared)])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = pair()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([part(x) for part in self.parts], -1)

    model, x = Both(), torch.randn(2, 32)
    w = rounded(model.parts[0].w)
    expected = F.linear(x, torch.cat([w, w[16:]]))
    bf.quantize(model, "int8", example_inputs=(x,), target="reference")
    torch.testing.assert_close(model(x), expected)
    codes = [part.folded_weights[0].parts[0] for part in model.parts]
    assert getattr(model.parts[1], codes[1]) is getattr(model.parts[2], codes[2])
    torch.testing.assert_close(through_a_file(model, Both(), tmp_path)(x), expected)


def test_a_parameter_and_its_transpose_in_one_module(tmp_path: Path) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w), w.t())

    model, x = Own(run), torch.randn(2, 32)
    w = model.w.detach().clone()
    expected = F.linear(F.linear(x, rounded(w)), rounded(w.t()))
    bf.quantize(model, "int8", example_inputs=(x,), target="reference")
    assert torch.equal(model(x), expected) and torch.equal(model.w, rounded(w))
    loaded = through_a_file(model, Own(run), tmp_path)
    assert torch.equal(loaded(x), expected) and torch.equal(loaded.w, rounded(w))
