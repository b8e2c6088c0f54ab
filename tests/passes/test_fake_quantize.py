"""Fake quantize: the form that trains, and that `fold` turns into codes without changing a bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.formats import describe, format
from bitfold.passes import (
    Annotate,
    FakeQuantize,
    Fold,
    Observe,
    Pipeline,
    Recipe,
    Rule,
    Sparsify,
    calibrate,
    capture,
    snapshot,
    state,
)
from bitfold.passes.stages import Stage


class Net(nn.Module):
    """A table, linears, a convolution and experts, with sizes that every group divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 128)
        self.fc = nn.Linear(128, 128)
        self.conv = nn.Conv1d(128, 128, 1)
        self.experts = nn.Parameter(torch.randn(2, 128, 128) / 11)
        self.head = nn.Linear(128, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.fc(self.embed(tokens)))
        x = torch.bmm(self.conv(x.transpose(1, 2)).transpose(1, 2), self.experts)
        return self.head(x)


def quantized(model: nn.Module, inputs: tuple[Tensor, ...], rule: Rule) -> GraphModule:
    gm = capture(model, inputs)
    Pipeline([Annotate(Recipe("one", (rule,))), FakeQuantize()]).run(gm)
    return gm


def test_the_whole_graph() -> None:
    gm = quantized(
        nn.Sequential(nn.Conv1d(4, 2, 3), nn.Flatten(1)), (torch.zeros(1, 4, 3),), Rule(op="*", weight="int4")
    )
    assert str(snapshot(gm)).splitlines() == [
        "_0_weight: f32[2, 4, 3] = self.0.weight",
        "_0_bias: f32[2] = self.0.bias",
        "input_1: f32[1, 4, 3] = input",
        "reshape: f32[2, 12] = aten.reshape.default(_0_weight, [2, 12])",
        "_0_weight_rounded: f32[2, 12] = bitfold.fake_quantize.default(reshape, 'int4')",
        "reshape_1: f32[2, 4, 3] = aten.reshape.default(_0_weight_rounded, [2, 4, 3])",
        "conv1d: f32[1, 2, 1] = aten.conv1d.default(input_1, reshape_1, _0_bias)  # int4 weight",
        "flatten: f32[1, 2] = aten.flatten.using_ints(conv1d, 1)",
        "return (flatten,)",
    ]
    assert state(gm).stage is Stage.fake_quantized


CATALOG = sorted({row.name for row in describe()})


@pytest.mark.parametrize("text", CATALOG)
def test_folding_changes_no_bit_for_any_format_of_the_catalog(text: str) -> None:
    model, tokens = Net().eval(), torch.randint(0, 16, (2, 3))
    rule = Rule(op="*", weight=text, on_misfit="report")
    gm = quantized(model, (tokens,), rule)
    assert sum("bitfold.fake_quantize" in line for line in str(snapshot(gm)).splitlines()) == 5
    expected = gm(tokens)
    Pipeline([Fold()]).run(gm)
    assert torch.equal(gm(tokens), expected)
    straight = capture(model, (tokens,))
    Pipeline([Annotate(Recipe("one", (rule,))), Fold()]).run(straight)
    assert torch.equal(straight(tokens), expected)


@pytest.mark.parametrize(
    "text", ["int8", "int4[g32]", "float8_e4m3fn[tensor]", "mxfp6_e3m2", "nvfp4", "uint8[zero]"]
)
def test_activations_fold_to_the_same_bits_too(text: str) -> None:
    model, tokens = Net().eval(), torch.randint(0, 16, (2, 3))
    gm = quantized(
        model, (tokens,), Rule(op="linear|head", weight="int8", input=text, output="float8_e5m2[tensor]")
    )
    expected = gm(tokens)
    Pipeline([Fold()]).run(gm)
    assert torch.equal(gm(tokens), expected)


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile:99.5"])
@pytest.mark.parametrize("text", ["int8[tensor]", "uint8[tensor,zero]", "float8_e4m3fn[tensor]"])
def test_calibrated_scales_are_the_same_in_training_and_folded(text: str, observer: str) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(8, 16)
    recipe = Recipe("static", (Rule(weight="int8", input=text, observer=observer),))
    outputs = []
    for passes in ([FakeQuantize()], [FakeQuantize(), Fold()], [Fold()]):
        gm = capture(model, (x,))
        Pipeline([Annotate(recipe), Observe()]).run(gm)
        calibrate(gm, [x, x * 0.5])
        Pipeline(passes).run(gm)
        outputs.append(gm(x))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    # Fixed scales: an input ten times as large clips, where scales chosen anew would grow with it.
    assert gm(x * 10).abs().max() < 5 * outputs[0].abs().max()


def test_the_gradient_goes_straight_through() -> None:
    model, x = nn.Linear(8, 4), torch.randn(3, 8)
    gm = quantized(model, (x,), Rule(weight="int4", input="int8"))
    gm(x).square().sum().backward()
    fmt, fmt_x = format("int4"), format("int8")
    weight = fmt.fake_quantize(model.weight.detach()).requires_grad_()
    rounded = fmt_x.fake_quantize(x)
    F.linear(rounded, weight, model.bias.detach()).square().sum().backward()
    assert torch.equal(model.weight.grad, weight.grad)


@pytest.mark.parametrize("text", ["int4[g16]", "int2", "ternary", "mxfp4", "float8_e4m3fn"])
def test_it_trains(text: str) -> None:
    """It must fit 16 random answers: the loss falls far below what rounding the float model leaves."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    x, wanted = torch.randn(16, 32), torch.randn(16, 32)
    gm = quantized(model, (x,), Rule(weight=text, input="int8"))
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(gm(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        trained = gm(x)
    Pipeline([Fold()]).run(gm)
    assert torch.equal(gm(x), trained)


def test_codes_of_a_checkpoint_are_left_behind_by_training() -> None:
    model, x = nn.Sequential(nn.Linear(32, 8, bias=False)), torch.randn(2, 32)
    gm = capture(model, (x,))
    state(gm).stored = {"0.weight": format("q8_0").quantize(torch.randn(8, 32))}
    Pipeline.parse("annotate{recipe=stored},fake_quantize,fold").run(gm)
    assert torch.equal(gm(x), F.linear(x, format("q8_0").fake_quantize(model[0].weight.detach())))


def test_a_pruned_weight_stays_pruned_in_training_and_folds_to_the_same_bits() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8, bias=False)), torch.randn(32, 16)
    gm = capture(model, (x,))
    Pipeline([Annotate("int8[g8]"), Sparsify("2:4"), FakeQuantize()]).run(gm)
    first = gm.get_buffer("_0_mask").clone()
    assert torch.equal(first.reshape(8, 4, 4).sum(-1), torch.full((8, 4), 2.0))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for _ in range(10):
        F.mse_loss(gm(x), torch.randn(32, 8)).backward()
        optimizer.step()
    assert torch.equal(gm.get_buffer("_0_mask"), first)
    with torch.no_grad():
        expected = gm(x)
        kept = model[0].weight * first
    Pipeline([Fold()]).run(gm)
    assert torch.equal(gm(x), expected)
    assert sorted(name for name, _ in gm.named_buffers()) == [
        "_0_weight_codes",
        "_0_weight_indices",
        "_0_weight_scales",
    ]
    decoded = gm(torch.eye(16).repeat(2, 1))[:16].T
    assert torch.equal(decoded != 0, (kept != 0) & (decoded != 0))
