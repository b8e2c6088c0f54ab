"""The pass that makes a graph train, the one that takes it back, and the mode between."""

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from bitfold.formats.gradient import Gradient
from bitfold.passes import (
    Annotate,
    Fold,
    Observe,
    Pipeline,
    Recipe,
    Rule,
    calibrate,
    capture,
    snapshot,
    state,
)
from bitfold.passes.training.mode import TrainMode
from bitfold.passes.training.quantizers import TrainQuantizers
from bitfold.passes.training.settle_quantizers import SettleQuantizers

RECIPE = Recipe("r", (Rule(weight="int4", input="int8[tensor]", observer="minmax"),))


def prepared(*options: object, batches: tuple[torch.Tensor, ...] = (torch.ones(2, 8),)) -> GraphModule:
    gm = capture(nn.Sequential(nn.Linear(8, 4, bias=False)), (torch.zeros(2, 8),))
    Pipeline([Annotate(RECIPE), Observe()]).run(gm)
    if batches:
        calibrate(gm, batches)
    Pipeline([TrainQuantizers(*options)]).run(gm)
    return gm


def lines(gm: GraphModule) -> list[str]:
    return str(snapshot(gm)).splitlines()


def test_the_whole_graph_with_learned_scales() -> None:
    gm = prepared(Gradient("lsq"), Gradient("lsq"))
    assert lines(gm) == [
        "_0_weight: f32[4, 8] = self.0.weight",
        "input_1: f32[2, 8] = input",
        "_0_input_step: f32[1, 1] = self._0_input_step",
        "_0_input_rounded_trained: f32[2, 8] = bitfold.train_quantize.default(input_1, "
        "'int8[tensor]', 'lsq+item', [_0_input_step], False, None, 0)",
        "_0_weight_step: f32[4, 1] = self._0_weight_step",
        "_0_weight_rounded_trained: f32[4, 8] = bitfold.train_quantize.default(_0_weight, 'int4', "
        "'lsq', [_0_weight_step], False, None, 0)",
        "linear: f32[2, 4] = aten.linear.default(_0_input_rounded_trained, "
        "_0_weight_rounded_trained)  # int4 weight, int8[tensor] input, observed by minmax",
        "return (linear,)",
    ]


def test_the_whole_graph_with_ranges_that_follow() -> None:
    gm = prepared(Gradient("straight"), Gradient("clip"), 5, True, batches=())
    assert lines(gm) == [
        "clock: i64[] = self.clock",
        "_0_weight: f32[4, 8] = self.0.weight",
        "input_1: f32[2, 8] = input",
        "_0_input_low: f32[1, 1] = self._0_input_low",
        "_0_input_high: f32[1, 1] = self._0_input_high",
        "_0_input_seen_low: f32[] = self._0_input_seen_low",
        "_0_input_seen_high: f32[] = self._0_input_seen_high",
        "observe_range_default = bitfold.observe_range.default(input_1, _0_input_seen_low, "
        "_0_input_seen_high, False)",
        "_0_input_rounded_trained: f32[2, 8] = bitfold.train_quantize.default(input_1, "
        "'int8[tensor]', 'clip', [_0_input_low, _0_input_high], False, clock, 5)",
        "_0_weight_rounded_trained: f32[4, 8] = bitfold.train_quantize.default(_0_weight, 'int4', "
        "'straight', [], False, clock, 5)",
        "linear: f32[2, 4] = aten.linear.default(_0_input_rounded_trained, "
        "_0_weight_rounded_trained)  # int4 weight, int8[tensor] input, observed by minmax",
        "return (linear,)",
    ]


def test_as_text_and_back() -> None:
    text = "train_quantizers{weight=lsq+stochastic, activation=smooth:4, warmup=3}"
    (found,) = Pipeline.parse(text).passes
    assert str(found.weight) == "lsq+stochastic" and found.activation.number == 4 and found.warmup == 3
    assert Pipeline.parse(str(Pipeline([found]))).passes == (found,)


@pytest.mark.parametrize("observe", [False, True])
def test_settled_and_folded_it_gives_the_same_bits(observe: bool) -> None:
    gm = prepared(Gradient("lsq"), Gradient("clip"), 0, observe)
    x = torch.randn(2, 8)
    expected = gm(x)
    Pipeline([TrainMode(on=True)]).run(gm)
    assert any("True" in line for line in lines(gm))
    gm(x)
    Pipeline([TrainMode(on=False)]).run(gm)
    assert torch.equal(gm(x), expected)
    Pipeline([SettleQuantizers()]).run(gm)
    assert torch.equal(gm(x), expected)
    assert state(gm).stage.name == "fake_quantized"
    Pipeline([Fold()]).run(gm)
    assert torch.equal(gm(x), expected)
    assert not dict(gm.named_parameters())


def test_a_batch_norm_that_freezes_and_is_plain_again() -> None:
    gm = capture(nn.Sequential(nn.BatchNorm1d(4)).eval(), (torch.zeros(8, 4),))
    before = lines(gm)
    Pipeline.parse("freeze_norm{step=7}").run(gm)
    assert lines(gm) == [
        "clock: i64[] = self.clock",
        *before[:-2],
        "freeze_norm: f32[8, 4] = bitfold.freeze_norm.default(input_1, _0_weight, _0_bias, "
        "_0_running_mean, _0_running_var, 0.1, 1e-05, False, clock, 7, False)",
        "return (freeze_norm,)",
    ]
    Pipeline([TrainMode(on=True)]).run(gm)
    x = torch.randn(8, 4)
    for step, follows in ((6, True), (7, False)):
        gm.clock.fill_(step)
        mean = gm.get_buffer("0.running_mean").clone()
        expected = nn.functional.batch_norm(
            x, mean.clone(), gm.get_buffer("0.running_var").clone(), training=follows
        )
        assert torch.equal(gm(x), expected)
        assert torch.equal(gm.get_buffer("0.running_mean"), mean) != follows
    Pipeline.parse("train_mode{on=false},settle_frozen_norm").run(gm)
    assert lines(gm)[-2].partition("= ")[2] == before[-2].partition("= ")[2]
