"""What a reviewer broke in search and diagnose: layers that no data reaches, names, formats that fit none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.lowering.search.sensitivity import sensitivity
from bitfold.lowering.search.trace import trace_sensitivity


class Net(nn.Module):
    """One layer of four is never called."""

    def __init__(self, names: tuple[str, ...] = ("a", "b", "c")) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(32, 32) for name in names})
        self.unused, self.last = nn.Linear(64, 64), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return self.last(x)


def made(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs).eval()


def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 32) for _ in range(2)]


@pytest.mark.parametrize("measure", [sensitivity, trace_sensitivity])
def test_a_layer_that_no_data_reaches_keeps_its_finest_format(measure: Any) -> None:
    table = measure(made(), data(), ("int8[g32]", "int4[g32]", "int2[g32]"))
    assert [one.format for one in table.of("unused")] == ["int8[g32]"]
    assert len(table.of("last")) == 3


def test_a_budget_of_time_with_such_a_layer_and_formats_that_fit_nowhere() -> None:
    formats = ("int8[g128]", "int8[g32]", "int4[g32]")  # no group of 128 in any layer
    recipe = bf.search(made(), data(), budget="10000 ms", formats=formats)
    assert bf.quantize(made(), recipe) is not None


def test_names_with_letters_of_patterns_mean_themselves() -> None:
    model = made(names=("a[0]", "a0", "b*", "bx"))
    table = sensitivity(model, data(), ("int8[g32]", "int4[g32]", "int2[g32]"))
    picked = {"layers.a[0]": "int8[g32]", "layers.a0": "int4[g32]", "layers.b*": "int2[g32]"}
    picked |= {"layers.bx": "int4[g32]", "unused": "int8[g32]", "last": "int4[g32]"}
    chosen = [one for one in table.choices if picked[one.layer] == one.format]
    q = bf.quantize(model, table.recipe(chosen, "named"))
    for path, text in picked.items():
        assert q.get_submodule(path).folded_weights[0].canonical.startswith(text.split("[")[0]), path


def test_a_relu_in_place_does_not_count_as_noise() -> None:
    torch.manual_seed(0)
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=inplace), nn.Linear(64, 8)).eval()
        q = bf.quantize(copy.deepcopy(model), "int8")
        found.append(bf.diagnose(model, q, data()))
    assert str(found[0]) == str(found[1])


class Twice(nn.Module):
    """One layer under two names, one in a plain list, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b, self.unused = self.a, nn.Linear(32, 32)
        self.plain = [nn.Linear(32, 32)]
        self.listed = self.plain[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.plain[0](self.b(torch.relu(self.a(x))))


def test_alone_is_of_the_layer_by_whatever_name_it_is_called() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    recipe = bf.Recipe("a", (bf.Rule(match="a", weight="int4[g32]"),))
    q = copy.deepcopy(model)
    bf.quantize(q, recipe)
    q.b = q.a
    found = bf.diagnose(model, q, data())
    one = next(layer for layer in found.layers if layer.path == "a")
    assert one.alone == pytest.approx(found.output, abs=0.01)


def test_a_layer_that_is_not_reached_has_no_ratio() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    q = bf.quantize(copy.deepcopy(model), "int4[g32]")
    q.plain[0] = q.listed
    found = {layer.path: layer for layer in bf.diagnose(model, q, data()).layers}
    unused, listed = found["unused"], found["listed"]
    assert all(value != value for value in (unused.isolated, unused.cumulative, unused.alone))
    assert 5 < listed.alone < 60
