"""Fold: the reference form, in whole graphs; tied weights once; each way that a weight comes to a product."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fold_cases import everything, folded, text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitfold.formats import format
from bitfold.passes import (
    Annotate,
    Pipeline,
    Recipe,
    Rule,
    capture,
    find_pass,
)


def test_a_linear() -> None:
    gm = capture(nn.Linear(8, 4), (torch.zeros(2, 8),))
    trace = Pipeline.parse("annotate{recipe=int4[g4]},fold").run(gm)
    assert [step.rewrites for step in trace.steps] == [0, 1, 1]
    assert text(gm) == [
        "bias: f32[4] = self.bias",
        "input_1: f32[2, 8] = input",
        "weight_codes: u8[4, 4] = self.weight_codes",
        "weight_scales: bf16[4, 2] = self.weight_scales",
        "weight_dequantized: f32[4, 8] = "
        "bitfold.dequantize.default([weight_codes, weight_scales], 'int4[g4]', 8, f32)",
        "linear: f32[2, 4] = aten.linear.default(input_1, weight_dequantized, bias)  # int4[g4] weight",
        "return (linear,)",
    ]
    assert [name for name, _ in gm.named_parameters()] == ["bias"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x)


def test_an_activation_is_quantized_once_for_all_that_read_it() -> None:
    assert text(folded(Pair(), torch.zeros(2, 8), "int8_dynamic", dynamic="batch")) == [
        "x: f32[s77, 8] = input",
        "q_input_quantized = bitfold.quantize.default(x, 'int8')",
        "q_input_codes: u8[s77, 8] = getitem(q_input_quantized, 0)",
        "q_input_scales: f32[s77, 1] = getitem(q_input_quantized, 1)",
        "q_input_dequantized: f32[s77, 8] = "
        "bitfold.dequantize.default([q_input_codes, q_input_scales], 'int8', 8, f32)",
        "q_weight_codes: u8[4, 8] = self.q_weight_codes",
        "q_weight_scales: f32[4, 1] = self.q_weight_scales",
        "q_weight_dequantized: f32[4, 8] = "
        "bitfold.dequantize.default([q_weight_codes, q_weight_scales], 'int8', 8, f32)",
        "linear: f32[s77, 4] = aten.linear.default(q_input_dequantized, q_weight_dequantized)"
        "  # int8 weight, int8 input",
        "k_weight_codes: u8[4, 8] = self.k_weight_codes",
        "k_weight_scales: f32[4, 1] = self.k_weight_scales",
        "k_weight_dequantized: f32[4, 8] = "
        "bitfold.dequantize.default([k_weight_codes, k_weight_scales], 'int8', 8, f32)",
        "linear_1: f32[s77, 4] = aten.linear.default(q_input_dequantized, k_weight_dequantized)"
        "  # int8 weight, int8 input",
        "add: f32[s77, 4] = aten.add.Tensor(linear, linear_1)",
        "return (add,)",
    ]


class Written(nn.Module):
    """Writes to an activation between its two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.q(x)
        x.add_(1.0)
        return y + self.k(x)


def test_an_activation_that_is_written_in_between_is_quantized_twice() -> None:
    x = torch.randn(3, 8)
    model = Written()
    gm = folded(model, x, "int8_dynamic")
    assert sum("bitfold.quantize" in line for line in text(gm)) == 2
    # 8 numbers, each to half a step of 1/127 of the largest: far from the 1.0 that a stale value would miss.
    assert torch.allclose(gm(x), model(x), atol=0.2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.lm_head = nn.Linear(8, 6, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.embed(tokens))


def test_tied_weights_are_stored_once() -> None:
    gm = folded(Tied(), torch.tensor([[0, 5]]), "int8_all")
    assert [line.split(" = ")[0] for line in text(gm)] == [
        "tokens: i64[1, 2]",
        "lm_head_weight_codes: u8[6, 8]",
        "lm_head_weight_scales: f32[6, 1]",
        "embed_weight_dequantized: f32[6, 8]",
        "embedding: f32[1, 2, 8]",
        "linear: f32[1, 2, 6]",
        "return (linear,)",
    ]
    assert len(list(gm.buffers())) == 2 and not list(gm.parameters())


class Dresses(nn.Module):
    """Each way in which a weight comes to a matmul or a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 8)
        self.kn = nn.Parameter(torch.randn(8, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.conv = nn.Conv1d(8, 4, 2, groups=2)
        self.image = nn.Conv2d(1, 2, 3, padding="same")
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(self.embed(tokens)) @ self.kn
        x = torch.einsum("bij,kj->bik", x, self.kn)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.kn.t()).unflatten(0, tokens.shape)
        x = torch.baddbmm(x, torch.bmm(x, self.experts), self.experts)
        return self.conv(x.transpose(1, 2)), self.image(x.unsqueeze(1))


def by_hand(model: Dresses, tokens: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """The same model with each weight rounded by the format, along the dimension that is reduced over."""

    def rounded(weight: Tensor) -> Tensor:
        return format(fmt).fake_quantize(weight.detach().contiguous())

    def experts() -> Tensor:
        return rounded(model.experts.transpose(1, 2)).transpose(1, 2)

    x = F.linear(rounded(model.embed.weight)[tokens], rounded(model.fc.weight), model.fc.bias)
    x = F.linear(x, rounded(model.kn.t()))
    x = F.linear(x, rounded(model.kn))
    x = F.linear(x.flatten(0, 1), rounded(model.kn), model.bias).unflatten(0, tokens.shape)
    x = torch.baddbmm(x, torch.bmm(x, experts()), experts())
    conv = rounded(model.conv.weight.flatten(1)).view_as(model.conv.weight)
    image = rounded(model.image.weight.flatten(1)).view_as(model.image.weight)
    return (
        F.conv1d(x.transpose(1, 2), conv, model.conv.bias, groups=2),
        F.conv2d(x.unsqueeze(1), image, model.image.bias, padding="same"),
    )


@pytest.mark.parametrize("fmt", ["int8", "uint4[zero]", "float6_e3m2[tensor]", "ternary"])
def test_every_dress_is_rounded_along_the_reduced_dimension(fmt: str) -> None:
    model, tokens = Dresses(), torch.randint(0, 10, (3, 4))
    gm = folded(model, tokens, everything(fmt))
    # The experts' weight is read twice, and the square one both ways round: seven different constants.
    assert sum("dequantize" in line and "aten" not in line for line in text(gm)) == 7
    for ours, theirs in zip(gm(tokens), by_hand(model, tokens, fmt), strict=True):
        assert torch.equal(ours, theirs)


def test_an_activation_with_a_last_dimension_that_varies() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1))
    recipe = Recipe("conv", (Rule(op="conv", weight="int8", input="int8[tensor]"),))
    gm = capture(model, (torch.randn(2, 4, 9),), dynamic=({2: torch.export.Dim.DYNAMIC},))
    Pipeline([Annotate(recipe), find_pass("fold")()]).run(gm)
    assert any("aten.sym_size.int(input_1, 2)" in line for line in text(gm))
    for length in (5, 12):
        x = torch.randn(2, 4, length)
        weight = format("int8").fake_quantize(model[0].weight.detach().flatten(1)).view(4, 4, 3)
        rounded = format("int8[tensor]").fake_quantize(x)
        assert torch.equal(gm(x), F.conv1d(rounded, weight, model[0].bias, padding=1))


def test_weights_in_bfloat16_decode_to_bfloat16() -> None:
    model, x = nn.Linear(16, 8, dtype=torch.bfloat16), torch.randn(2, 16, dtype=torch.bfloat16)
    gm = folded(model, x, "int8_dynamic")
    fmt = format("int8")
    expected = F.linear(fmt.fake_quantize(x), fmt.fake_quantize(model.weight.detach()), model.bias)
    assert gm(x).dtype is torch.bfloat16 and torch.equal(gm(x), expected)


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 4).map(lambda n: 16 * n), min_size=2, max_size=4),
    bias=st.booleans(),
    fmt=st.sampled_from(["int8", "int4[g16]", "uint3[zero]", "mxint8", "float8_e5m2", "int2", "binary"]),
    activation=st.sampled_from(["", "int8", "float8_e4m3fn[tensor]", "int4[g16]"]),
    op=st.sampled_from([torch.relu, torch.tanh, lambda x: x * 2]),
)
def test_random_stacks_fold_to_what_rounding_by_hand_gives(sizes, bias, fmt, activation, op) -> None:
    if fmt == "mxint8":
        sizes = [2 * size for size in sizes]
    layers = [nn.Linear(k, n, bias=bias) for k, n in pairwise(sizes)]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = op(layer(x))
            return x

    x = torch.randn(3, sizes[0])
    gm = folded(Stack(), x, everything(fmt, input=activation))
    expected = x
    for layer in layers:
        if activation:
            expected = format(activation).fake_quantize(expected)
        expected = op(F.linear(expected, format(fmt).fake_quantize(layer.weight.detach()), layer.bias))
    assert torch.equal(gm(x), expected)
