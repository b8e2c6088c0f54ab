"""Prepared once more, buffers and classes of the user's, and what only one mode of a model has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.formats.gradient import Gradient
from bitfold.passes.rules import Rule

CALIBRATED = bf.Recipe("one", (Rule(weight="int8", input="int8[tensor]", observer="minmax"),))


class Counting(nn.Module):
    """A forward of its own, with buffers named as ranges are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("tokens_seen_total", torch.zeros(1))
        self.register_buffer("fc_input_low", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.tokens_seen_total + self.fc_input_low  # type: ignore[no-any-return]


def test_buffers_of_the_users_are_no_ranges() -> None:
    model, x = Counting(), torch.randn(4, 16)
    gm = bf.prepare_qat(model, CALIBRATED, bf.Qat(observe=5), scope="program", example_inputs=(x,))
    gm.train()
    gm(x)
    bf.advance(gm)
    assert float(model.fc_input_low) == 0 and float(model.tokens_seen_total) == 0
    moved = [b for n, b in gm.named_buffers() if n.startswith("fc_input_low") and n != "fc_input_low"]
    assert [float(one) for one in moved] == [float(x.min())]


@pytest.mark.parametrize("start", ["rule", "clip"])
def test_fewer_bits_begin_where_a_fresh_model_would(start: str) -> None:
    torch.manual_seed(0)
    again, fresh = nn.Sequential(nn.Linear(64, 8)), nn.Sequential(nn.Linear(64, 8))
    fresh.load_state_dict(again.state_dict())
    bf.prepare_qat(again, "int4[g32]", bf.Qat("lsq", start=start))
    bf.prepare_qat(again, "int2[g32]", bf.Qat("lsq", start=start))
    bf.prepare_qat(fresh, "int2[g32]", bf.Qat("lsq", start=start))
    assert torch.equal(again[0].weight_step, fresh[0].weight_step)


def test_erased_channels_are_refused_when_prepared_once_more() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)
    everything = bf.Recipe("all", (Rule(op="*", weight="int8"),))
    bf.prepare_qat(model, everything, bf.Qat("straight"))
    with pytest.raises(bf.BitfoldError, match="zeros in its weight"):
        bf.prepare_qat(model, everything, bf.Qat("lsq"))


class FSDPHead(nn.Linear):
    """A user's class, by a name like those that fully_shard makes."""

    def kind(self) -> str:
        return "kept"


def test_a_class_is_no_shard_for_its_name() -> None:
    model = nn.Sequential(FSDPHead(16, 8))
    bf.prepare_qat(model, "int8")
    bf.convert(model, target="reference")
    assert isinstance(model[0], FSDPHead) and model[0].kind() == "kept"


class Noisy(nn.Module):
    """Dropout that only training calls, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = F.dropout(x, 0.5)
        return self.fc(x)  # type: ignore[no-any-return]


def test_dropout_that_only_training_calls_is_told() -> None:
    gm = bf.prepare_qat(Noisy(), "int8", scope="program", example_inputs=(torch.randn(4, 16),))
    assert any("dropout" in str(miss) for miss in bf.report(gm).misses)


@pytest.mark.parametrize("layer", [nn.RReLU(), nn.RReLU(inplace=True), nn.FeatureAlphaDropout(0.5)])
def test_what_is_random_in_training_is_so_in_a_program(layer: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), layer), torch.randn(64, 16)
    gm = bf.prepare_qat(model.eval(), "int8", scope="program", example_inputs=(x,))
    assert torch.equal(gm(x), gm(x))
    gm.train()
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))


def test_flags_of_a_gradient_outlive_its_scales() -> None:
    learned = Gradient.parse("lsq+stochastic").of_item()
    assert str(learned.without_scales()) == "straight+stochastic"
    assert Gradient("clip").without_scales() == Gradient("clip")


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_numbers_that_are_none_are_not_converted(name: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    bf.prepare_qat(model, "int8")
    with torch.no_grad():
        getattr(model[0], name).view(-1)[0] = torch.nan
    with pytest.raises(bf.BitfoldError, match="NaN or infinity"):
        bf.convert(model, target="reference")
    assert model[0].is_prepared
