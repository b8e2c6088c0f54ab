"""What is no finite number, or next to none, in CPU kernels: NaN, infinities, the largest, the smallest."""

from __future__ import annotations

import pytest
import torch
from cpp_cases import U, drawn, expected, laid, operands, pair

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.epilogue import OPS, Epilogue
from bitfold.formats import Quantized, format

ADDED = ["int4[g64]", "uint4[g32,zero]", "uint2[g64,f16,zero:min]", "uint3[zero]"]


@pytest.fixture(scope="session")
def compiled() -> None:
    """Kernels of several tests, by all cores at once."""
    build.know([pair(text) for text in [*ADDED, "float8_e4m3fn"]])


def test_rows_do_not_read_on_into_the_next(compiled: None) -> None:
    """K is no whole run: an infinity in the next row must not meet a zero."""
    f = format("float8_e5m2[unscaled]")
    codes = torch.zeros(5, 40, dtype=torch.uint8)
    codes[1, 0], codes[:, 1] = 0x7C, 0x3C
    spec = GemmSpec(f, 5, 40, "f32")
    build.know([spec])
    for m in (1, 3, 40):
        (y,) = torch.ops.bitfold.fused([torch.ones(m, 40), codes], str(spec))
        assert (y[:, [0, 2, 3, 4]] == 1).all() and y[:, 1].isinf().all()


def test_a_code_that_is_nan_is_nan(compiled: None) -> None:
    spec = pair("float8_e4m3fn")
    x, codes, scales = operands(spec, 2, 0)
    codes[3, 5] = 0xFF
    for m in (2, 40):
        (y,) = torch.ops.bitfold.fused([x[:1].expand(m, -1), codes, scales], str(spec))
        assert y[:, 3].isnan().all() and y[:, :3].isfinite().all()


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize(
    ("text", "places"), [("sigmoid(y0)", 4), ("silu(y0)", 4), ("tanh(y0)", 4), ("gelu_tanh(y0)", None)]
)
def test_functions(text: str, places: int | None, m: int) -> None:
    """In units of the last place, over all that float32 holds; None: of x, since gelu's terms cancel. Codes
    that no vectors multiply in digits, which take the last place of x."""
    f = format("float8_e4m3fn").with_layout("bytes")
    x = [torch.linspace(-120, 120, 4001), torch.linspace(-0.5, 0.5, 401), 2.0 ** -torch.arange(1.0, 126.0)]
    x = torch.cat([*x, torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 3e38, -3e38])])
    x = torch.nn.functional.pad(x, (0, -len(x) % m)).reshape(-1, m)
    spec = GemmSpec(f, 24, 2, "f32", epilogue=Epilogue.parse(text))
    build.know([spec])
    codes, scales = torch.tensor([[0x38, 0]], dtype=torch.uint8).repeat(24, 1), torch.ones(24, 1)
    rows = torch.stack([x, torch.zeros_like(x)], -1)
    y = torch.stack([torch.ops.bitfold.fused([row, codes, scales], str(spec))[0] for row in rows])
    assert torch.equal(y.nan_to_num(7), y[..., :1].expand_as(y).nan_to_num(7))
    found, given = y[..., 0].double(), x.double()
    want = OPS[text.partition("(")[0]].run(given)
    of = want.abs() if places else given.abs() + 1
    kept = want.isfinite() & given.isfinite()
    error = (found - want).abs()[kept]
    least = 2.0**-126 * (1 + given.abs()[kept])  # where e**-x is past the largest number
    assert (error <= (places or 4) * 2 * U * of[kept] + least).all(), (error / of[kept]).max() / (2 * U)
    assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.isposinf(), want.isposinf())


@pytest.mark.parametrize("text", ADDED)
@pytest.mark.parametrize("m", [4, 12])
def test_specials_propagate(compiled: None, text: str, m: int) -> None:
    """Also where a number is added to codes: an infinity meets some that are zero, though no value is."""
    spec = pair(text)
    x = torch.zeros(m, spec.k)
    x[0, 3], x[1, 3], x[2, 3] = float("nan"), float("inf"), 1.0
    parts = spec.weight.quantize(drawn(spec.n, spec.k, seed=0)).parts
    (y,) = torch.ops.bitfold.fused([x, *parts], str(spec))
    want = x.double() @ Quantized.from_parts(spec.weight, parts, spec.k).dequantize(torch.float64).T
    assert y[0].isnan().all() and (y[3:] == 0).all()
    assert torch.equal(y[1].isnan(), want[1].isnan()) and y[2].isfinite().all()
    assert torch.equal(y[1].isposinf(), want[1].isposinf())


@pytest.mark.parametrize("m", [1, 3, 12])
@pytest.mark.parametrize("text", ["uint8[zero]", "uint8[g32,f32,zero]", "uint4[g64,f32,zero]"])
def test_an_infinity_that_meets_zero_is_nan(text: str, m: int) -> None:
    """A code that is its zero point is 0, also where zero point times scale is no float32 number."""
    spec = laid(text)
    inputs = operands(spec, m, seed=3)
    w = Quantized.from_parts(spec.weight, inputs[1:], spec.k).dequantize()
    column = int((w == 0).sum(0).argmax())
    assert (w[:, column] == 0).any()
    inputs[0][0, column] = float("inf")
    y, want = build.call(spec, inputs), inputs[0] @ w.T
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())


@pytest.mark.parametrize("m", [1, 3, 12])
@pytest.mark.parametrize("text", ["int8", "int4[g64]", "uint4[g64,zero]", "float8_e4m3fn"])
def test_large_numbers_do_not_overflow_on_the_way(text: str, m: int) -> None:
    """3e38 times a code passes float32; times the value that it means it does not."""
    spec = laid(text)
    inputs = operands(spec, m, seed=4)
    scales = inputs[1 + spec.weight.parts.index("scales")]
    scales.mul_(2.0**-8)
    inputs[0][0, 5] = 3e38
    want, _ = expected(spec, inputs)
    assert (build.call(spec, inputs).double() - want).norm() <= 1e-5 * want.norm()
