"""fold_constants, eliminate_dead and train_mode, as whole-graph snapshots."""

import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.formats.errors import BitfoldError
from bitfold.passes import Pipeline, capture, erase_dead_constants, snapshot, state


def text(block: str) -> str:
    return textwrap.dedent(block).strip()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 4))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("count", torch.zeros(1))
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        bias = torch.arange(3) * (self.scale * 3)
        _ = torch.relu(x)
        return F.linear(x, self.w.to(torch.float64).to(torch.float32), bias) + self.count


def test_constants_are_computed_and_weights_stay_weights() -> None:
    model = Scaled()
    gm = capture(model, torch.zeros(2, 4), dynamic="batch")
    trace = Pipeline.parse("fold_constants,eliminate_dead").run(gm)
    assert trace.steps[1].rewrites == 1
    assert trace.steps[-1].code == text(
        """
        w: f32[3, 4] = self.w
        count: f32[1] = self.count
        x: f32[s77, 4] = input
        add_: f32[1] = aten.add_.Tensor(count, 1)
        mul_1_const: f32[3] = self.mul_1_const
        to: f64[3, 4] = aten.to.dtype(w, f64)
        to_1: f32[3, 4] = aten.to.dtype(to, f32)
        linear: f32[s77, 3] = aten.linear.default(x, to_1, mul_1_const)
        add: f32[s77, 3] = aten.add.Tensor(linear, add_)
        return (add,)
        """
    )
    x = torch.randn(2, 4)
    assert torch.equal(gm(x), model(x) - 1)
    assert [name for name, _ in gm.named_parameters()] == ["w"]
    assert sorted(name for name, _ in gm.named_buffers()) == ["count", "mul_1_const"]
    assert model.unused.weight is not None


def test_a_big_constant_is_left_to_be_computed() -> None:
    gm = capture(Scaled(), torch.zeros(2, 4))
    assert Pipeline.parse("fold_constants{limit=2}").run(gm).steps[1].rewrites == 0
    with pytest.raises(BitfoldError, match="limit"):
        Pipeline.parse("fold_constants{limit=-1}")


def test_dead_tensors_go_and_live_ones_stay() -> None:
    gm = capture(Scaled(), torch.zeros(2, 4))
    gm.register_buffer("extra", torch.zeros(7))
    gm.add_module("more", nn.Sequential(nn.Linear(2, 2)))
    assert erase_dead_constants(gm) >= 3
    assert not hasattr(gm, "extra") and not hasattr(gm, "more")
    assert gm.w.shape == (3, 4)


class Trains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.bn(x))


def test_train_mode_flips_both_ways() -> None:
    model = Trains().eval()
    gm = capture(model, torch.randn(8, 4), dynamic="batch")
    before = str(snapshot(gm))
    assert Pipeline.parse("train_mode").run(gm).steps[1].rewrites == 2
    shown = str(snapshot(gm))
    assert "batch_norm.default(x, bn_weight, bn_bias, bn_running_mean, bn_running_var, True, 0.1" in shown
    assert "dropout.default(batch_norm, 0.5, True)" in shown
    x = torch.randn(1000, 4) + 3
    torch.manual_seed(1)
    ours = gm(x)
    model.bn.running_mean.zero_(), model.bn.running_var.fill_(1)
    torch.manual_seed(1)
    assert torch.equal(ours, model.train()(x))
    assert model.bn.running_mean.mean() > 0.1
    assert Pipeline.parse("train_mode{on=false}").run(gm).steps[1].rewrites == 2
    assert str(snapshot(gm)) == before
    assert torch.equal(gm(x), model.eval()(x))


def test_running_statistics_are_constants_only_in_evaluation() -> None:
    gm = capture(Trains().eval(), torch.randn(8, 4))
    from bitfold.passes import constant

    mean = next(node for node in gm.graph.nodes if node.name == "bn_running_mean")
    assert constant(gm, mean) is not None
    Pipeline.parse("train_mode").run(gm)
    assert constant(gm, mean) is None


def test_attention_dropout_cannot_be_flipped_and_says_so() -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    gm = capture(Attends(), torch.randn(1, 2, 3, 4))
    Pipeline.parse("train_mode{on=false}").run(gm)
    assert [miss.reason for miss in state(gm).misses] == [
        "attention keeps its dropout of 0.1; capture the model in eval mode"
    ]
