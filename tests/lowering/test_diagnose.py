"""`bf.diagnose`: the layer that loses the quality is the one that is named."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import bitfold as bf


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def quantized(model: nn.Module, *rules: bf.Rule) -> nn.Module:
    return bf.quantize(copy.deepcopy(model), bf.Recipe("mixed", rules), target="reference")


def test_the_coarse_layer_is_the_worst(model: nn.Sequential) -> None:
    q = quantized(model, bf.Rule(weight="int8[row]"), bf.Rule(match="2", weight="int2[g32]"))
    found = bf.diagnose(model, q, [torch.randn(16, 32), torch.randn(16, 32)])
    assert [one.path for one in found.layers] == ["0", "2", "4"]
    worst = found.worst()[0]
    assert worst.path == "2" and worst.format == "int2[g32]"
    assert worst.isolated < 15 < 30 < found.layers[0].isolated
    # What is behind it is spoilt by it, though its own rounding is fine.
    assert found.layers[2].isolated > 30 > found.layers[2].cumulative
    # The model with that layer alone loses nearly all that the model loses.
    assert abs(worst.alone - found.output) < 0.5
    assert str(found).splitlines()[1].startswith("2 ")


def test_ratios_are_those_of_their_definition(model: nn.Sequential) -> None:
    q, x = quantized(model, bf.Rule(match="0", weight="int4[g32]")), torch.randn(16, 32)
    (layer,) = bf.diagnose(model, q, [x]).layers
    exact, value = model[0](x).double(), q[0](x).double()
    expected = 10 * math.log10(float(exact.square().sum() / (value - exact).square().sum()))
    assert layer.isolated == pytest.approx(expected) == layer.cumulative
    end, noisy = model(x).double(), q(x).double()
    assert layer.alone == pytest.approx(
        10 * math.log10(float(end.square().sum() / (noisy - end).square().sum()))
    )


def test_what_is_exact_is_infinite(model: nn.Sequential) -> None:
    for layer in (model[0], model[2], model[4]):
        layer.weight.data = layer.weight.data.sign()
    q = quantized(model, bf.Rule(weight="binary[row]"))
    assert all(one.isolated == math.inf for one in bf.diagnose(model, q, [torch.randn(4, 32)]).layers)


def test_both_models_are_left_as_they_were(model: nn.Sequential) -> None:
    q, x = quantized(model.train(), bf.Rule(weight="int4[g32]")), torch.randn(4, 32)
    modules = dict(model.named_modules())
    bf.diagnose(model, q, [x])
    assert model.training and dict(model.named_modules()) == modules
    assert not any(module._forward_hooks for module in (*model.modules(), *q.modules()))


def test_mistakes_are_one_sentence(model: nn.Sequential) -> None:
    q = quantized(model, bf.Rule(weight="int4[g32]"))
    with pytest.raises(bf.BitfoldError, match="no batches"):
        bf.diagnose(model, q, [])
    with pytest.raises(bf.BitfoldError, match="no layer of this Sequential is quantized"):
        bf.diagnose(model, model, [torch.randn(4, 32)])
    with pytest.raises(bf.BitfoldError, match="is quantized there too"):
        bf.diagnose(q, q, [torch.randn(4, 32)])
    with pytest.raises(bf.BitfoldError, match="does not go through"):
        bf.diagnose(model, q, [torch.randn(4, 31)])
    with pytest.raises(bf.BitfoldError, match="diagnose takes"):
        bf.diagnose(model, "q", [torch.randn(4, 32)])  # type: ignore[arg-type]
