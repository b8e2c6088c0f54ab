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


class Counting(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(32, width)
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("anew", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.in_place.add_(1)
        self.anew = self.anew + 1
        return self.fc(x)


def test_counters_stay_where_they_were() -> None:
    model = Counting()
    q = quantized(model, bf.Rule(weight="int8"))
    bf.diagnose(model, q, [torch.randn(4, 32)])
    for one in (model, q):
        assert one.in_place == 0 and one.anew == 0


def test_models_of_other_results_are_refused() -> None:
    with pytest.raises(bf.BitfoldError, match=r"do not belong together: one returns \[4, 16\] where"):
        bf.diagnose(Counting(16), quantized(Counting(8), bf.Rule(weight="int8")), [torch.randn(4, 32)])


def test_a_layer_that_gives_no_numbers_is_the_worst_and_said(model: nn.Sequential) -> None:
    q = quantized(model, bf.Rule(weight="int4[g32]"))
    q[2].scales.fill_(math.nan)
    found = bf.diagnose(model, q, [torch.randn(4, 32)])
    assert [one.path for one in found.worst(2)] in (["2", "4"], ["2", "0"])
    first, *_, last = str(found).splitlines()[1:]
    assert "no number" in first and last == "the model's output: no number"


def test_mistakes_are_one_sentence(model: nn.Sequential) -> None:
    q = quantized(model, bf.Rule(weight="int4[g32]"))
    with pytest.raises(bf.BitfoldError, match="no batches"):
        bf.diagnose(model, q, [])
    with pytest.raises(bf.BitfoldError, match="no layer of this Sequential is quantized"):
        bf.diagnose(model, model, [torch.randn(4, 32)])
    with pytest.raises(bf.BitfoldError, match="give the float model first"):
        bf.diagnose(q, model, [torch.randn(4, 32)])
    x = torch.randn(4, 32)
    program = bf.quantize(model, "int8", scope="program", example_inputs=(x,), target="reference")
    with pytest.raises(bf.BitfoldError, match="a program's layers are operators; `bitfold explain`"):
        bf.diagnose(model, program, [x])
    spoilt = copy.deepcopy(model)
    spoilt[2].weight.data[0, 0] = math.nan
    with pytest.raises(bf.BitfoldError, match=r"batch 0 has NaN in it; so has 2\.weight"):
        bf.diagnose(spoilt, q, [x])
    with pytest.raises(bf.BitfoldError, match="is quantized there too"):
        bf.diagnose(q, q, [torch.randn(4, 32)])
    with pytest.raises(bf.BitfoldError, match="does not go through"):
        bf.diagnose(model, q, [torch.randn(4, 31)])
    with pytest.raises(bf.BitfoldError, match="diagnose takes"):
        bf.diagnose(model, "q", [torch.randn(4, 32)])  # type: ignore[arg-type]


class Pair(nn.Module):
    """A module with a weight of its own that returns two tensors and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.linear(x, self.weight)
        return y, y * 2


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair = nn.Linear(32, 32), Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.pair(self.first(x))
        return one + two  # type: ignore[no-any-return]


def test_a_layer_that_returns_several_tensors() -> None:
    torch.manual_seed(0)
    model, x = Pairs().eval(), torch.randn(16, 32)
    q = bf.quantize(copy.deepcopy(model), "int4[g32]", example_inputs=x, target="reference")
    assert {one.path for one in bf.diagnose(model, q, [x]).layers} == {"first", "pair"}
    assert all(10 < one.isolated < 40 for one in bf.diagnose(model, q, [x]).layers)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(x[chosen == index])
        return out


def test_experts_that_get_other_tokens_have_no_ratio_behind_the_router() -> None:
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(512, 32)
    q = bf.quantize(copy.deepcopy(model), "int3[g32]", target="reference")
    found = {one.path: one for one in bf.diagnose(model, q, [x]).layers}
    assert 5 < found["router"].cumulative < 40
    sent = [(model.router(x).argmax(-1) == i).sum() for i in range(4)]
    sent_by_codes = [(q.router(x).argmax(-1) == i).sum() for i in range(4)]
    moved = [a != b for a, b in zip(sent, sent_by_codes, strict=True)]
    assert any(moved)
    for index, other in enumerate(moved):
        expert = found[f"experts.{index}"]
        assert 5 < expert.isolated < 40
        assert math.isnan(expert.cumulative) == bool(other)


def test_a_model_that_is_one_layer_is_said() -> None:
    layer = nn.Linear(32, 32)
    with pytest.raises(bf.BitfoldError, match="one layer and no model"):
        bf.diagnose(layer, bf.quantize(copy.deepcopy(layer), "int4[g32]"), [torch.randn(4, 32)])


def test_what_is_written_to_a_layers_result_is_not_its_noise() -> None:
    torch.manual_seed(0)
    layers, x = (nn.Linear(32, 64), nn.Linear(64, 8)), torch.randn(16, 32)
    found = []
    for inplace in (False, True):
        model = nn.Sequential(layers[0], nn.ReLU(inplace), layers[1]).eval()
        found.append(bf.diagnose(model, quantized(model, bf.Rule(weight="int8")), [x]))
    assert found[0].layers == found[1].layers


def test_hooks_of_the_users_are_no_noise(model: nn.Sequential) -> None:
    x = torch.randn(16, 32)
    plain = bf.diagnose(model, quantized(model, bf.Rule(weight="int8")), [x]).layers[0]
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].register_forward_hook(lambda module, args, result: result / 2)
    hooked = bf.diagnose(model, quantized(model, bf.Rule(weight="int8")), [x]).layers[0]
    assert hooked.isolated == pytest.approx(plain.isolated, abs=3.0)  # the bias is there half as much


class Reused(nn.Module):
    """A layer of two names, one that is called out of a list, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.idle = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.again, self.list = self.first, [self.hidden]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.again(torch.tanh(self.first(x))))
        return torch.tanh(self.list[0](x))


@pytest.mark.parametrize("only", ["first", "hidden"])
def test_alone_is_the_layer_wherever_it_is_called(only: str) -> None:
    torch.manual_seed(0)
    model, x = Reused().eval(), torch.randn(64, 32)
    q = quantized(model, bf.Rule(match=only, weight="int4[g32]"), bf.Rule(match="idle", weight="int2[g32]"))
    if only == "hidden":
        assert q.list[0] is q.hidden
    found = bf.diagnose(model, q, [x])
    by_name = {one.path: one for one in found.layers}
    assert by_name[only].alone == pytest.approx(found.output)
    assert math.isnan(by_name["idle"].alone) and math.isnan(by_name["idle"].isolated)
    assert found.worst()[-1].path == "idle" and "not reached" in str(found)
    assert "forward" not in vars(model.first) and model.again is model.first


class Counter(nn.Module):
    """Every call doubles what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.mul_(2)
        return self.fc(x) * self.scale


def test_every_run_starts_from_the_same_buffers() -> None:
    torch.manual_seed(0)
    model, batches = Counter().eval(), [torch.randn(16, 32), torch.randn(16, 32)]
    found = bf.diagnose(model, quantized(model, bf.Rule(weight="int4[g32]")), batches)
    assert found.layers[0].alone == pytest.approx(found.output) and found.output > 10
