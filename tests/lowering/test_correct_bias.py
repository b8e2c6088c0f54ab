"""Bias correction: the mean of a layer's error goes, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_model import Model
from torch import Tensor, nn

import bitfold as bf


class Network(nn.Module):
    """A convolution and two linears; what comes in has a mean, so rounding shifts what goes out."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=bias)
        self.fc = nn.Linear(8, 16, bias=bias)
        self.out = nn.Linear(16, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(torch.relu(self.conv(x)).mean((2, 3)))))


def images(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(8, 3, 8, 8, generator=draw) for _ in range(4)]


RECIPE = bf.Recipe("coarse", (bf.Rule(op="linear|conv", weight="int3"),))


def errors(model: nn.Module, algorithm: str | None) -> Tensor:
    """Result less the float model's, on data that nothing has seen, [samples, channels]."""
    q = copy.deepcopy(model)
    bf.quantize(q, RECIPE, algorithm=algorithm, calibration=images(1), target="reference")
    return torch.cat([(q(x) - model(x)).detach() for x in images(2)])


def test_the_mean_of_the_error_goes() -> None:
    torch.manual_seed(0)
    model = Network().eval()
    plain, corrected = errors(model, None), errors(model, "correct_bias")
    assert corrected.mean(0).norm() < 0.3 * plain.mean(0).norm()
    assert corrected.square().mean() < 0.5 * plain.square().mean()


def test_the_bias_is_the_mean_of_the_layers_own_error() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(100, 8) + 1
    model = nn.Sequential(layer).eval()
    rounded = bf.format("int3").fake_quantize(layer.weight.detach())
    wanted = layer.bias.detach() + (x @ (layer.weight.detach() - rounded).mT).mean(0)
    bf.quantize(model, "int3", algorithm="correct_bias", calibration=list(x.split(20)), target="reference")
    assert torch.allclose(model[0].bias, wanted, atol=1e-6)
    assert torch.allclose(model[0].weight, rounded)


def test_a_bias_is_added_only_if_asked() -> None:
    torch.manual_seed(0)
    model = Network(bias=False).eval()
    plain, kept = errors(model, None), errors(model, "correct_bias")
    assert torch.equal(plain, kept)
    assert errors(model, "correct_bias{add=true}").mean(0).norm() < 0.3 * plain.mean(0).norm()
    bf.quantize(model, RECIPE, algorithm="correct_bias", calibration=images(1), target="reference")
    assert "correct_bias{add=true} would give it one" in str(bf.report(model))


@pytest.mark.parametrize("algorithm", ["equalize,clip", "follow,clip,gptq", "smooth", "gptq"])
def test_it_goes_with_what_changes_weights(algorithm: str) -> None:
    """The error is against the weights that were rounded, whatever made them."""
    torch.manual_seed(0)
    model = Model().eval()
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 20, 32, generator=draw) + 1 for _ in range(4)]

    def shift(steps: str) -> float:
        q = copy.deepcopy(model)
        bf.quantize(q, "int3[g32]", algorithm=steps, calibration=batches, target="reference")
        return float(sum((q(x) - model(x)).detach().mean((0, 1)) for x in batches).norm())

    assert shift(f"{algorithm},correct_bias") < 0.7 * shift(algorithm)


def test_an_added_bias_is_saved_and_loaded(tmp_path: Path) -> None:
    """Into a skeleton whose layers have one."""
    torch.manual_seed(0)
    model = Network(bias=False).eval()
    bf.quantize(model, RECIPE, algorithm="correct_bias{add=true}", calibration=images(1), target="reference")
    bf.save(model, tmp_path / "model.safetensors")
    again = bf.load(tmp_path / "model.safetensors", into=Network().eval())
    assert torch.equal(again(images(2)[0]), model(images(2)[0]))


def test_where_it_may_stand() -> None:
    model = Network().eval()
    with pytest.raises(bf.BitfoldError, match="put it after clip"):
        bf.quantize(model, RECIPE, algorithm="correct_bias,clip", calibration=images(1), target="reference")
    with pytest.raises(bf.BitfoldError, match="give calibration"):
        bf.quantize(model, RECIPE, algorithm="correct_bias", target="reference")
    assert type(model.fc) is nn.Linear


def test_what_hooks_of_the_users_do_is_no_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    model[0].register_forward_hook(lambda module, args, result: result + 5)
    model[2].register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))
    x = torch.randn(64, 32)
    exact, q = model(x), copy.deepcopy(model)
    bf.quantize(q, "int8", algorithm="correct_bias", calibration=[x], target="reference")
    assert (q(x) - exact).norm() < 0.02 * exact.norm()


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 16).index_add(0, (x[:, 0] > 0).nonzero()[:, 0], self.fc(x[x[:, 0] > 0]))


def test_a_batch_without_rows_for_a_layer_says_nothing_of_it() -> None:
    """In whatever order they come."""
    torch.manual_seed(0)
    model, x = Expert().eval(), torch.randn(64, 32)
    some, none = x[x[:, 0] > 0], x[x[:, 0] <= 0]
    biases = []
    asked: dict[str, Any] = {"algorithm": "correct_bias", "target": "reference"}
    for batches in ([some], [some, none], [none, some]):
        q = bf.quantize(copy.deepcopy(model), "int3[g32]", calibration=batches, **asked)
        biases.append(q.fc.bias.detach())
    assert torch.equal(biases[0], biases[1]) and torch.equal(biases[0], biases[2])


def test_a_single_vector_is_a_batch() -> None:
    torch.manual_seed(0)
    fc = nn.Sequential(nn.Linear(32, 8))
    before = fc[0].bias.detach().clone()
    data = [torch.randn(32) for _ in range(40)]
    bf.quantize(fc, "int2[g32]", algorithm="correct_bias", calibration=data)
    assert not torch.equal(fc.get_parameter("0.bias"), before)
