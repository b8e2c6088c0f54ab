"""`bf.search` on models that are not a plain stack: layers that no data reach, names with signs of patterns,
buffers that a forward writes to, formats that fit nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from search_cases import Unequal
from torch import Tensor, nn

import bitfold as bf
from bitfold.codegen.device import device
from bitfold.lowering.folded import Folded
from bitfold.lowering.outputs import divergence
from bitfold.lowering.search.integer_program import fewest_losses_in_time
from bitfold.lowering.search.sensitivity import Sensitivity, sensitivity
from bitfold.lowering.search.smallest import rounded_loss
from bitfold.lowering.search.times import Times, measure_times, model_times
from bitfold.lowering.search.trace import trace_sensitivity
from bitfold.passes.recipes import Recipe

pytest.importorskip("scipy", reason="bf.search solves its program with scipy")

FORMATS = ("int8[g32]", "int4[g32]", "int2[g32]")


def data() -> list[Tensor]:
    return list(torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(1)))


class Idle(Unequal):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(64, 64)


@pytest.mark.parametrize("by", ["measured", "trace"])
def test_a_layer_that_no_data_reach_is_left_alone_and_named(by: Literal["measured", "trace"]) -> None:
    """It would cost nothing in the smallest format, and its bits would pay for the others."""
    torch.manual_seed(0)
    model = Idle().eval()
    with pytest.warns(UserWarning, match="no batch reaches layer idle"):
        recipe = bf.search(model, data(), budget="4.5 bits", formats=FORMATS, by=by)
    assert "left alone: idle" in recipe.about
    q = bf.quantize(copy.deepcopy(model), recipe, target="reference")
    assert type(q.idle) is nn.Linear and isinstance(q.last, Folded)
    assert "the data do not reach it" in str(bf.report(q))


class Tied(nn.Module):
    """Two layers read one weight, which is stored once."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.second(torch.relu(self.first(x)))))
        return out


@pytest.mark.parametrize("make", [sensitivity, trace_sensitivity])
def test_a_weight_of_two_layers_is_one_choice(make: Callable[..., Sensitivity]) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    table = make(model, data(), FORMATS)
    assert table.numel == {"first": 64 * 64, "last": 64 * 32} and table.tied == {"first": ("second",)}
    (one,) = (choice for choice in table.of("first") if choice.format == "int2[g32]")
    both = Recipe("both", tuple(bf.Rule(match=name, weight="int2[g32]") for name in ("first", "second")))
    assert one.bits == 2.5 * 64 * 64
    factor = 1e-4 if make is sensitivity else 1.0  # an estimate: within a factor of two
    exact = rounded_loss(model, both, data(), divergence)
    assert abs(math.log2(one.loss / exact)) <= factor
    for bits in (3, 4, 5):
        recipe = bf.search(model, data(), budget=f"{bits} bits", table=table)
        q = bf.quantize(copy.deepcopy(model), recipe, target="reference")
        assert q.first.codes is q.second.codes
    # Both take their time.
    times = Times({(name, text): 1.0 for name in ("first", "second", "last") for text in FORMATS}, 0.0, "")
    with pytest.raises(bf.BitfoldError, match=r"take 3e\+03 ms"):
        fewest_losses_in_time(table, times, 2.5)


class Sometimes(Unequal):
    """Its second layer runs for batches of more than 16 rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(y + self.second(y) if len(x) > 16 else y)


def test_a_layer_that_the_first_batch_does_not_reach_takes_no_time() -> None:
    torch.manual_seed(0)
    model, batches = Sometimes().eval(), [data()[0][:16], *data()]
    recipe = bf.search(model, batches, budget="100000 ms", formats=("int8[g32]", "int4[g32]"))
    assert {rule.weight for rule in recipe.rules} == {"int8[g32]"}


def test_formats_that_fit_no_layer_take_no_time() -> None:
    torch.manual_seed(0)
    times = measure_times(Unequal().eval(), data(), ("int8[g128]", "int4[g32]"), repeats=1)
    assert {text for _, text in times.layers} == {"int4[g32]"}


def test_a_gpus_times_are_of_every_layer_whatever_fits_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    times = model_times(model, [torch.randn(4, 256)], ("int8[g128]", "int4[g32]"), card=device("NVIDIA H200"))
    assert set(times.layers) == {("0", "int8[g128]"), ("0", "int4[g32]"), ("2", "int4[g32]")}
    assert min(times.layers.values()) > 0


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("a[0]", "b*", "a0", "bx", "c")})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.d.values():
            x = torch.relu(layer(x))
        return x


def test_a_rule_is_of_one_layer_whatever_its_name() -> None:
    torch.manual_seed(0)
    model = Named().eval()
    table = sensitivity(model, [torch.randn(8, 32)], FORMATS)
    wanted = {
        "d.a[0]": "int8[g32]",
        "d.b*": "int2[g32]",
        "d.a0": "int4[g32]",
        "d.bx": "int4[g32]",
        "d.c": "int4[g32]",
    }
    chosen = [one for one in table.choices if wanted[one.layer] == one.format]
    q = bf.quantize(model, table.recipe(chosen, "by hand"), target="reference")
    got = {path: m.folded_weights[0].canonical for path, m in q.named_modules() if isinstance(m, Folded)}
    assert got == wanted


class Counting(Unequal):
    """What it gives doubles with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(2)
        return super().forward(x) * self.scale / 2


def test_every_run_starts_from_the_same_buffers() -> None:
    torch.manual_seed(0)
    counting = Counting().eval()
    plain = Unequal().eval()
    plain.load_state_dict(counting.state_dict(), strict=False)
    assert sensitivity(counting, data(), FORMATS) == sensitivity(plain, data(), FORMATS)
    assert counting.scale == 1
    recipe = bf.search(counting, data(), budget="5% perplexity", formats=FORMATS)
    assert recipe.rules == bf.search(plain, data(), budget="5% perplexity", formats=FORMATS).rules
    assert counting.scale == 1


class Frozen(Unequal):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_traces_without_gradients_are_said() -> None:
    with pytest.raises(bf.BitfoldError, match=r"under torch\.no_grad\(\), .* by='measured'"):
        bf.search(Frozen().eval(), data(), budget="4.5 bits", formats=FORMATS, by="trace")
