"""Folding of batch norm: the whole graph, the numbers, and what stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitfold.passes import Pipeline, capture, snapshot, state
from bitfold.passes.batch_norm import FoldBatchNorm

FOLD = Pipeline.parse("fold_batch_norm")


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """In eval mode, with running statistics and affine numbers that are not the first ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        model.train()(torch.randn(8, *shape) * 3 + 1)
    return model.eval()


def test_the_whole_graph() -> None:
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), 3, 6, 6
    )
    before = copy.deepcopy(model.state_dict())
    gm = capture(model, (torch.zeros(2, 3, 6, 6),))
    assert FOLD.run(gm).steps[-1].rewrites == 1
    assert str(snapshot(gm)).splitlines() == [
        "input_1: f32[2, 3, 6, 6] = input",
        "_0_weight_1: f32[4, 3, 3, 3] = self.0.weight",
        "_0_bias: f32[4] = self.0.bias",
        "conv2d: f32[2, 4, 6, 6] = aten.conv2d.default(input_1, _0_weight_1, _0_bias, [1, 1], [1, 1])",
        "relu: f32[2, 4, 6, 6] = aten.relu.default(conv2d)",
        "return (relu,)",
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 7, 5)),
        (nn.Sequential(nn.Conv1d(4, 6, 3, padding="same"), nn.BatchNorm1d(6, affine=False)), (4, 7)),
        (nn.Sequential(nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3, eps=0.1)), (2, 4, 4, 4)),
        (nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), (5,)),
    ],
)
def test_numbers_are_rounded_once(model: nn.Module, shape: tuple[int, ...]) -> None:
    model = trained(model, *shape)
    x = torch.randn(2, *shape)
    gm = capture(model, (x,))
    assert FOLD.run(gm).steps[-1].rewrites == 1
    layer, norm = copy.deepcopy(model).double()
    g = (1.0 if norm.weight is None else norm.weight) / torch.sqrt(norm.running_var + norm.eps)
    wanted = layer.weight * (torch.ones_like(norm.running_mean) * g).reshape(
        -1, *(1,) * (layer.weight.ndim - 1)
    )
    assert torch.equal(gm.get_parameter("0.weight"), wanted.float())
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)


class Stays(nn.Module):
    """Each reason why one is not folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.first, self.batch = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.batch.track_running_stats, self.batch.running_mean, self.batch.running_var = False, None, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        return self.norm(y) + y + self.batch(self.shared(x))


def test_what_stays_is_reported() -> None:
    gm = capture(Stays().eval(), (torch.randn(1, 3, 2, 2),))
    trace = FOLD.run(gm)
    assert trace.steps[-1].rewrites == 0
    assert sorted(miss.reason for miss in trace.misses) == [
        "'conv2d' is read by others too",
        "it normalizes by the statistics of its batch",
        "no convolution or product of rows stands before it",
    ]


def test_a_weight_that_is_read_twice_is_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.conv(x)

    model = trained(Twice(), 3, 4, 4)
    x = torch.randn(1, 3, 4, 4)
    gm = capture(model, (x,))
    assert FOLD.run(gm).steps[-1].rewrites == 1
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_training_graph_and_a_frame_keep_theirs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.zeros(2, 3, 4, 4)
    assert FOLD.run(capture(model.train(), (x,))).steps[-1].rewrites == 0
    gm = capture(model.eval(), (x,))
    state(gm).scope = "frame"
    trace = FOLD.run(gm)
    assert trace.steps[-1].rewrites == 0 and "the user's" in trace.misses[0].reason


def test_annotation_sees_the_folded_layer() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 3, 6, 6)
    gm = capture(model, (torch.zeros(1, 3, 6, 6),))
    Pipeline([FoldBatchNorm(), *Pipeline.parse("annotate{recipe=int8_conv},fold").passes]).run(gm)
    assert "self.0_weight_codes" in str(snapshot(gm)) or "_0_weight_codes" in str(snapshot(gm))
    x = torch.randn(2, 3, 6, 6)
    y, wanted = gm(x[:1]), model(x[:1])
    assert float((y - wanted).norm() / wanted.norm()) < 0.02
