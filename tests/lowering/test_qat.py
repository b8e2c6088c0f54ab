"""Training on rounded numbers, module scope: what trains is what is converted, bit for bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qat_cases import OPTIONS, step
from torch import Tensor, nn

import bitfold as bf
from bitfold.formats import describe, format
from bitfold.lowering.folded import Folded
from bitfold.lowering.qat.prepared import Prepared
from bitfold.passes.rules import Rule

CATALOG = [row.name for row in describe()]
GRANULARITIES = ["", "row", "tensor", "g16", "8x16"]
KINDS = ["linear", "embedding", "conv1d", "conv2d"]
FEW = [
    "int8",
    "int4[g16]",
    "uint4[g16,zero]",
    "int2[tensor]",
    "float8_e4m3fn[8x16]",
    "mxfp4",
    "nvfp4",
    "ternary",
]


def made(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer of every kind whose rows are 32 long, and an input."""
    if kind == "linear":
        return nn.Linear(32, 16), torch.randn(3, 5, 32)
    if kind == "embedding":
        return nn.Embedding(16, 32, padding_idx=3), torch.randint(0, 16, (3, 5))
    if kind == "conv1d":
        return nn.Conv1d(16, 16, 2, stride=2), torch.randn(2, 16, 9)
    return nn.Conv2d(16, 8, (2, 2), padding=1, groups=2), torch.randn(2, 16, 5, 4)


def spelled(name: str, grain: str) -> str | None:
    """The format `name` with another granularity; None if it has none, or the same."""
    fmt = format(name)
    if fmt.scale is None or not grain:
        return name if not grain else None
    inside = str(fmt)
    parts = inside[inside.index("[") + 1 : -1].split(",") if "[" in inside else []
    known = ("row", "tensor")
    kept = [p for p in parts if p not in known and not (p[0] == "g" and p[1:].isdigit()) and "x" not in p]
    text = f"{fmt.element.name}[{','.join([grain, *kept])}]"
    return text if str(format(text)) != inside else None


def check(kind: str, rule: Rule, how: bf.Qat, dtype: torch.dtype) -> None:
    """Prepare, train two steps, and hold the converted layer against the prepared one in eval."""
    layer, x = made(kind)
    model = nn.Sequential(layer).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    calibration = [x] if rule.observer else None
    bf.prepare_qat(model, bf.Recipe("one", (rule,)), how, calibration=calibration)
    start = layer.weight.detach().clone()
    optimizer = torch.optim.Adam(bf.parameter_groups(model, lr=0.02, scale_lr=0.001))
    for _ in range(2):
        step(model, x, optimizer)
    # Two's complement of one bit, {-1, 0}, rounds all but the largest to 0: nothing reaches the weight.
    assert not torch.equal(layer.weight, start) or "int1_twos" in f"{rule.weight} {rule.input}"
    model.eval()
    with torch.no_grad():
        expected = model(x)
    bf.convert(model, target="reference")
    assert isinstance(layer, Folded) and not isinstance(layer, Prepared)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert expected.dtype == dtype and bool(expected.isfinite().all())


def takes(text: str, kind: str) -> bool:
    shape = tuple(made(kind)[0].weight.flatten(1).shape)
    try:
        format(text).check(shape)
    except bf.FormatError:
        return False
    return True


PRODUCT = [
    (text, kind)
    for name in CATALOG
    for grain in GRANULARITIES
    if (text := spelled(name, grain)) is not None
    for kind in KINDS
    if takes(text, kind)
]


def test_the_product_leaves_no_format_of_the_catalog_out() -> None:
    covered = {str(format(text)) for text, _ in PRODUCT}
    # Rows of these layers are 32 long.
    longer = {"int4[g128]", "uint4[g128,zero]", "tinygemm"}
    assert {str(format(name)) for name in CATALOG if name not in longer} <= covered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", FEW)
def test_what_trained_is_what_is_converted(text: str, kind: str) -> None:
    for name, dtype in (("straight", torch.float32), ("lsq", torch.bfloat16), ("smooth", torch.float32)):
        torch.manual_seed(0)
        check(kind, Rule(op="*", weight=text), OPTIONS[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("how", ["straight", "lsq"])
@pytest.mark.parametrize("text,kind", PRODUCT)
def test_every_format_granularity_and_kind(text: str, kind: str, how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(kind, Rule(op="*", weight=text), OPTIONS[how], dtype)


DYNAMIC = ["int8", "int4[g16]", "uint8[zero]", "mxfp8", "nvfp4"]
STATIC = ["int8[tensor]", "uint4[tensor,zero]", "float8_e5m2[tensor]"]


@pytest.mark.parametrize("text", [*DYNAMIC, *STATIC])
def test_activations_too(text: str) -> None:
    torch.manual_seed(0)
    rule = Rule(op="*", weight="int4", input=text, output="int8[tensor]")
    check("linear", rule, OPTIONS["straight"], torch.bfloat16)
    if "tensor" in text:
        static = replace(rule, observer="minmax")
        check("conv2d", rule, OPTIONS["straight"], torch.float32)
        check("conv2d", static, OPTIONS["straight"], torch.float32)
        check("linear", static, OPTIONS["lsq"], torch.float32)
        check("linear", static, OPTIONS["lsq"], torch.bfloat16)


STRIDED = {
    "linear": torch.randn(3, 32, 20).transpose(1, 2),
    "conv1d": torch.randn(2, 9, 16).transpose(1, 2),
    "conv2d": torch.randn(2, 16, 5, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("observer", ["", "minmax"], ids=["dynamic", "static"])
@pytest.mark.parametrize("output", ["", "int8[tensor]"], ids=["in", "in and out"])
@pytest.mark.parametrize("kind", STRIDED)
def test_activations_in_another_order_in_memory(kind: str, output: str, observer: str) -> None:
    """A matmul adds in another order for other strides; codes have their own."""
    torch.manual_seed(0)
    rule = Rule(op="*", weight="int4", input="int8[tensor]", output=output, observer=observer)
    for dtype in (torch.float32, torch.bfloat16):
        model, x = nn.Sequential(made(kind)[0]).to(dtype).eval(), STRIDED[kind].to(dtype)
        bf.prepare_qat(model, bf.Recipe("one", (rule,)), calibration=[x])
        lows = [name for name in model.state_dict() if name.endswith("_low")]
        assert len(lows) == (bool(observer) + bool(observer and output))
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(bf.convert(model, target="reference")(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_activations_of_the_whole_catalog(name: str) -> None:
    torch.manual_seed(0)
    for grain in ("", "row", "tensor", "g16"):
        text = spelled(name, grain)
        if text is None or not takes(text, "linear"):
            continue
        for how in ("straight", "lsq"):
            check("linear", Rule(op="*", weight="int8", input=text), OPTIONS[how], torch.float32)
            data = format(text).scale is not None and format(text).scale.rule in ("absmean", "hqq")
            if grain == "tensor" and not data:
                rule = Rule(op="*", weight="int8", input=text, observer="minmax")
                check("linear", rule, OPTIONS[how], torch.float32)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(
        ["int4[g8]", "uint3[g8,zero]", "int2", "float6_e2m3", "nf4[g8]", "ternary[tensor]", "int8[4x8]"]
    ),
    st.sampled_from(["straight", "lsq", "smooth"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from(["", "int8", "float8_e4m3fn"]),
)
def test_random_shapes(
    text: str, how: str, dtype: torch.dtype, rows: int, cols: int, batch: int, activation: str
) -> None:
    torch.manual_seed(rows * 10 + cols)
    model = nn.Sequential(nn.Linear(8 * cols, 4 * rows), nn.GELU(), nn.Linear(4 * rows, 8)).to(dtype)
    rule = Rule(match="0", weight=text, input=activation)
    bf.prepare_qat(model, bf.Recipe("one", (rule,)), OPTIONS[how])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        step(model, torch.randn(4, 8 * cols, dtype=dtype), optimizer)
    model.eval()
    x = torch.randn(batch, 8 * cols, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        bf.convert(model, target="reference")
        assert torch.equal(model(x), expected)
