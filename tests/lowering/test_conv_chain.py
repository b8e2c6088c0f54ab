"""Convolutions with static scales on the CPU: what becomes of a graph, and that its numbers are the
reference's.

The reference target runs the folded graph in float32 as it stands. Sums there round, and here they do not,
so a number may fall to the other side of a border between two codes: results are compared by their distance
in the norm.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import bitfold as bf
from bitfold.lowering.cpu.conv import parsed
from bitfold.lowering.cpu.signs import not_negative

pytestmark = pytest.mark.skipif(bool(bf.get_target("cpu").missing()), reason="there is no C++ compiler")


class Residual(nn.Module):
    """A stem with a pool, a block with a residual, one with a short cut of its own, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.short = nn.Conv2d(16, 24, 1, 2)
        self.down = nn.Conv2d(16, 24, 3, 2, 1, groups=2)
        self.depth = nn.Conv2d(24, 24, 3, padding="same", groups=24)
        self.fc = nn.Linear(24 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 2)
        y = torch.relu(self.norms[0](self.one(x)))
        y = torch.relu(self.norms[1](self.two(y)) + x)
        y = nn.functional.relu6(self.down(y)) + self.short(y)
        y = nn.functional.hardswish(self.depth(y))
        return self.fc(y.view(y.shape[0], -1))


class Line(nn.Module):
    """One dimension, and a result that is no vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(4, 20, 3, dilation=2), nn.BatchNorm1d(20)
        self.second = nn.Conv1d(20, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.silu(self.norm(self.first(x))))


def pooled() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3),
            nn.BatchNorm2d(16),
            nn.Sigmoid(),
        ),
        *(
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, 10),
        ),
    )


class Padded(nn.Module):
    """Zeros around images by operators of their own: more on one side, for two readers, no zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 5, 2, padding=(0, 1), groups=16)
        self.sides = nn.ModuleList(nn.Conv2d(16, 8, 3) for _ in range(2))
        self.ones, self.cut = nn.Conv2d(16, 4, 3), nn.Conv2d(4, 4, 3)
        self.line = nn.Conv1d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        pad = nn.functional.pad
        x = nn.functional.relu6(self.norm(self.stem(pad(x, (0, 1, 0, 1)))))
        x = pad(torch.relu(self.depth(pad(x, (1, 2)))), (1, 1, 2, 0))
        x = torch.cat([side(x) for side in self.sides], 1)
        x = self.ones(pad(x, (1, 1, 1, 1), value=1.0))
        x = self.cut(pad(x, (1, -1, 1, 1)))
        return self.line(pad(x.flatten(2), (0, 3)))


CASES = {
    "padded": (Padded, (3, 24, 24)),
    "residual": (Residual, (3, 16, 16)),
    "line": (Line, (4, 21)),
    "pooled": (pooled, (1, 14, 14)),
}


def model_of(case: str) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[case]
    torch.manual_seed(3)
    model = make()
    with torch.no_grad():
        model.train()(torch.randn(16, *shape))
    return model.eval(), torch.randn(6, *shape)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def texts(gm: torch.fx.GraphModule) -> list[str]:
    """What the kernels of a graph say, without sizes and formats of weights."""
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.bitfold.conv.default)
    return [re.sub(r"int8\[panels\w+\] ", "", str(call.args[1])) for call in calls]


SHIFTED = bf.Recipe("shifted", (bf.Rule("*", op="linear|conv", weight="int8", input="int8[tensor,zero]"),))


@pytest.mark.parametrize("recipe", ["int8_static", SHIFTED], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("case", CASES)
def test_all_ways_to_run_a_model_agree(case: str, recipe: str | bf.Recipe) -> None:
    model, x = model_of(case)
    shape = {"calibration": [x]}
    with torch.no_grad():
        wanted = bf.quantize(copy.deepcopy(model), recipe, target="reference", **shape)(x)
        module = bf.quantize(copy.deepcopy(model), recipe, **shape)
        program = bf.quantize(copy.deepcopy(model), recipe, scope="program", **shape)
        assert texts(program) and all(("zero" in text) == (recipe is SHIFTED) for text in texts(program))
        found = {
            "module": module(x),
            "program": program(x),
            "module, compiled": torch.compile(module, backend="bitfold", options={"recipe": "none"})(x),
            "program, compiled": torch.compile(program, backend="bitfold", options={"recipe": "none"})(x),
            "program, without Dynamo": bf.compile(program)(x),
            "module, by Inductor": torch.compile(module)(x),
        }
        exact = model(x)
    assert distance(wanted, exact) < 0.05
    for way, y in found.items():
        assert y.shape == wanted.shape and y.is_contiguous() == wanted.is_contiguous(), way
        # A step of the last layer's codes, here and there.
        assert distance(y, wanted) < 0.01, way
    assert torch.equal(found["module, compiled"], found["program, compiled"])


# How a kernel has the weights of a convolution.
W = "int8[narrow,panels"


def test_the_kernels_of_a_program() -> None:
    model, x = model_of("residual")
    gm = bf.quantize(model, "int8_static", scope="program", calibration=[x])
    assert texts(gm) == [
        f"conv 16x3x3x3 s2x2 p1x1 {W}16x4t9] x:int8[tensor] -> relu(add(mul(y0,v0),v1))",
        f"conv 16x16x3x3 p1x1 {W}16x4t9] x:+int8[tensor] bias -> relu(add(mul(y0,v0),v1)) y:int8[tensor]",
        f"conv 16x16x3x3 p1x1 {W}16x4t9] x:+int8[tensor]"
        " -> relu(add(add(mul(y0,v0),v1),e0)) e:f32 y:int8[tensor]",
        f"conv 24x8x3x3 s2x2 p1x1 g2 {W}16x4t9r12] x:+int8[tensor] bias -> clamp(y0,0.0,6.0)",
        f"conv 24x16x1x1 s2x2 {W}16x4] x:+int8[tensor] bias -> add(e0,y0) e:f32 y:int8[tensor]",
        f"conv 24x1x3x3 p1x1 g24 {W}16x1t9] x:int8[tensor] bias -> hardswish(y0) y:int8[tensor]",
        "conv 5x96 x:int8[tensor] bias",
    ]


def test_zeros_around_an_image_are_the_kernels_own() -> None:
    """But for what is cut off, and for what is not zero."""
    model, x = model_of("padded")
    gm = bf.quantize(model, "int8_static", scope="program", calibration=[x])
    assert texts(gm) == [
        f"conv 16x3x3x3 s2x2 p0x0x1x1 {W}16x4t9] x:int8[tensor]"
        " -> clamp(add(mul(y0,v0),v1),0.0,6.0) y:int8[tensor]",
        f"conv 16x1x5x5 s2x2 p0x2x0x3 g16 {W}16x1t25] x:+int8[tensor] bias -> relu(y0) y:int8[tensor]",
        f"conv 8x16x3x3 p2x1x0x1 {W}16x4t9] x:+int8[tensor] bias",
        f"conv 8x16x3x3 p2x1x0x1 {W}16x4t9] x:+int8[tensor] bias",
        f"conv 4x16x3x3 {W}16x4t9] x:int8[tensor] bias",
        f"conv 4x4x3x3 {W}16x4t9] x:int8[tensor] bias -> y0 y:int8[tensor]",
        f"conv 6x4x1x3 p0x0x0x3 {W}16x4t3] x:int8[tensor] bias",
    ]
    left = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.pad.default)
    assert [node.args[1] for node in left] == [[1, 1, 1, 1], [1, -1, 1, 1]]


def test_codes_go_through_a_view() -> None:
    model, x = model_of("pooled")
    gm = bf.quantize(model, "int8_static", scope="program", calibration=[x])
    assert texts(gm) == [
        f"conv 8x1x3x3 {W}16x4t9] x:int8[tensor] bias -> relu(y0)",
        f"conv 16x8x3x3 {W}16x4t9] x:+int8[tensor] bias -> sigmoid(add(mul(y0,v0),v1))",
        "conv 32x64 x:+int8[tensor] bias -> relu(add(mul(y0,v0),v1)) y:int8[tensor]",
        "conv 10x32 x:+int8[tensor] bias",
    ]
    flat = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.flatten.using_ints)
    assert [node.args[0].target for node in flat] == [operator.getitem]


def test_a_program_with_a_batch_that_varies() -> None:
    model, x = model_of("residual")
    gm = bf.quantize(copy.deepcopy(model), "int8_static", scope="program", calibration=[x], dynamic="batch")
    fast = torch.compile(gm, backend="bitfold", options={"recipe": "none"})
    with torch.no_grad():
        for count in (1, 3, 6):
            assert distance(fast(x[:count]), gm(x[:count])) < 0.01


def test_a_result_that_leaves_the_graph_lies_as_it_did() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    module = bf.quantize(copy.deepcopy(model), "int8_static", calibration=[x])
    fast = torch.compile(module, backend="bitfold", options={"recipe": "none"})
    with torch.no_grad():
        for y in (module(x), fast(x)):
            assert y.is_contiguous() and y.view(2, -1).shape == (2, 8 * 16)


def test_bytes_and_dtypes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Saved and loaded codes give the same numbers; another dtype is computed from the same float32
    kernels."""
    model, x = model_of("pooled")
    folded = bf.quantize(copy.deepcopy(model), "int8_static", calibration=[x])
    with torch.no_grad():
        wanted = folded(x)
        bf.save(folded, tmp_path / "model.safetensors")
        again = bf.load(tmp_path / "model.safetensors", into=copy.deepcopy(model))
        assert torch.equal(again(x), wanted)
        assert torch.allclose(folded[0].weight, model[0].weight, atol=0.01)
        half = folded.to(torch.bfloat16)(x.bfloat16())
        assert half.dtype == torch.bfloat16 and distance(half.float(), wanted) < 0.05
        back = folded.to(torch.float32)(x)
        assert back.dtype == torch.float32 and distance(back, wanted) < 0.02


def test_what_kernels_do_not_take_stays_and_is_right() -> None:
    """Activations with a zero point, weights of 4 bits, another dtype: decoded, as the reference does."""
    model, x = model_of("pooled")
    for rule in (
        bf.Rule(op="linear|conv", weight="int8", input="uint8[tensor,zero]", observer="minmax"),
        bf.Rule(op="linear|conv", weight="int4", input="int8[tensor]", observer="minmax"),
    ):
        recipe = bf.Recipe("other", (rule,))
        with torch.no_grad():
            wanted = bf.quantize(copy.deepcopy(model), recipe, calibration=[x], target="reference")(x)
            gm = bf.quantize(copy.deepcopy(model), recipe, calibration=[x], scope="program")
            convolutions = [text for text in texts(gm) if parsed_kernel(text)]
            assert not convolutions
            assert distance(gm(x), wanted) < 0.01


def parsed_kernel(text: str) -> bool:
    """Whether a kernel's text is that of a convolution, not of a product."""
    return text.split(" ")[1].count("x") == 3


@pytest.mark.parametrize(
    ("body", "never"),
    [
        (lambda x: torch.clamp(x, 0.0, 6.0), True),
        (lambda x: torch.clamp(x, 0.0), True),
        (lambda x: torch.clamp(x, 0.0, -1.0), False),
        (lambda x: torch.clamp(x, -1.0, 6.0), False),
        (lambda x: torch.ops.aten.hardtanh(x, 0.0, 6.0), True),
        (lambda x: torch.ops.aten.hardtanh(x), False),
        (lambda x: torch.clamp_min(x, 0.0), True),
        (lambda x: torch.relu(x) * 2.0 + torch.relu(x), True),
        (lambda x: torch.relu(x) * -2.0, False),
    ],
)
def test_what_is_never_negative(body: Callable[[Tensor], Tensor], never: bool) -> None:
    """Of a clamp whose ends cross the upper one is left, whatever its sign."""
    gm = make_fx(body)(torch.randn(4))
    (result,) = gm.graph.output_node().all_input_nodes
    assert (result in not_negative(gm)) == never
    assert not never or bool((body(torch.linspace(-9, 9, 99)) >= 0).all())


def test_a_negative_scale_is_refused_where_signs_matter() -> None:
    model, x = model_of("pooled")
    gm = bf.quantize(model, "int8_static", scope="program", calibration=[x])
    told = [
        parsed(str(call.args[1])).positive
        for call in gm.graph.find_nodes(op="call_function", target=torch.ops.bitfold.conv.default)
    ]
    assert told == [False, True, True, True]
    scale = gm.get_buffer("_3_input_scales")
    scale.neg_()
    with pytest.raises(RuntimeError, match="not negative"):
        gm(x)
