"""Many rows of x in tiles of AMX: values, exactly where they are sums of integers, and x that has no digits.

    int8[g128] x int8, 70 rows of x   ->   the same numbers as AVX-512 VNNI's, to the last bit

Where a processor has no AMX, tiles are the model of `headers/amx.h`.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from conv_cases import operands as operands_of_conv
from conv_cases import spec_of
from cpp_cases import check, expected, operands, pair
from test_conv_values import check as check_conv

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.cpp.body import Body
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.codegen.cpp.tiles import tiled
from bitfold.codegen.cpp.vectors import VECTORS, widest
from bitfold.codegen.epilogue import Epilogue
from bitfold.formats import format

TILES = widest() if widest().tiles else VECTORS["amx_model"]
TEXTS = ["int8 x int8", "int4[g64] x int8", "uint4[g32,zero] x int8", "int8", "int4[g64]", "uint4[g32,zero]"]
MORE = [
    "uint8[zero] x int8[tensor]", "int8[g128] x int8", "int3[g64] x int8", "mxfp4", "int3[g128]", "int6",
    "uint2[g64,f16,zero:min]", "float8_e4m3fn", "int4[g64,e4m3]", "uint4[g128,zero:float]", "ternary",
    "uint8[zero]",
]  # fmt: skip
pytestmark = pytest.mark.skipif(
    "__AVX512VNNI__" not in widest().macros, reason="tiles stand beside AVX-512 VNNI"
)


def sized(text: str, n: int, k: int) -> GemmSpec:
    weight, _, activation = text.partition(" x ")
    of_x = format(activation) if activation else None
    laid = cpu_layout(format(weight), k, of_x)
    assert laid is not None
    return GemmSpec(laid, n, k, "f32", activation=of_x)


@pytest.fixture(scope="module")
def compiled() -> None:
    build.know([pair(text) for text in TEXTS], TILES)


@pytest.mark.parametrize("text", TEXTS)
def test_formats(compiled: None, text: str) -> None:
    spec = pair(text)
    for m in (1, 9, 17, 32, 70):
        check(spec, m, seed=m, vectors=TILES)


@pytest.mark.slow
@pytest.mark.parametrize("text", MORE)
def test_more_formats(text: str) -> None:
    spec = pair(text)
    for m in (1, 9, 17, 32, 70):
        check(spec, m, seed=m, vectors=TILES)


@pytest.mark.parametrize("text", ["int8 x int8", "int4[g64] x int8", "int4[g64]", "int8"])
def test_more_than_one_task(compiled: None, text: str) -> None:
    """Rows of the weight and of x that several tasks share, codes of a row that are decoded in parts; blocks
    of x that end in the middle."""
    for n, k, m in ((100, 1600, 9), (33, 576, 161), (70, 4160, 300)):
        if "g64" not in text:
            k += 8
        check(sized(text, n, k), m, seed=m, vectors=TILES)


@pytest.mark.parametrize("text", ["int8 x int8", "int4[g64] x int8"])
def test_sums_of_codes_are_those_of_other_vectors(compiled: None, text: str) -> None:
    spec = sized(text, 70, 1152)
    inputs = operands(spec, 45, seed=3)
    found = []
    for vectors in (TILES, VECTORS["avx512vnni"]):
        build.know([spec], vectors)
        found.append(torch.ops.bitfold.fused(inputs, str(spec))[0])
    assert torch.equal(*found)


def test_epilogues(compiled: None) -> None:
    for text, weights, x in (("mul(silu(y0),y1)", 2, "bf16"), ("add(mul(y0,v0),e0)", 1, "f16")):
        f = cpu_layout(format("int4[g64]"), 192)
        assert f is not None
        spec = GemmSpec(f, 45, 192, x, True, weights=weights, epilogue=Epilogue.parse(text))
        check(spec, 37, vectors=TILES)


def test_which_blocks_x_is_cut_into() -> None:
    """The scale's, up to 128; nothing below 32, nor where codes are no bytes before they are floats."""
    blocks = {
        "int8": 128, "int4[g128]": 128, "int4[g64]": 64, "mxfp4": 32, "nvfp4": None, "nf4[g64]": None,
        "float8_e4m3fn": None, "int8 x int8": None,
    }  # fmt: skip
    for text, block in blocks.items():
        made = tiled(Body(pair(text)))
        assert (None if made is None else made.block) == block, text


def test_x_without_digits_goes_the_way_of_floats(compiled: None) -> None:
    """Not finite, past 2**64, and a block whose numbers lie far below its largest: where they stand, while
    rows around them have digits."""
    spec = pair("int4[g64]")
    build.know([spec], TILES)
    inputs = operands(spec, 150, seed=1)
    x = inputs[0]
    far = x.clone()
    far[33] *= 2.0**-20
    far[33, ::64] = 1.0
    large = x.clone()
    large[149, 7] = large[2, 7] = 2.0**70
    for given in (far, large):
        (y,) = torch.ops.bitfold.fused([given, *inputs[1:]], str(spec))
        build.know([spec], VECTORS["avx512vnni"])
        (other,) = torch.ops.bitfold.fused([given, *inputs[1:]], str(spec))
        build.know([spec], TILES)
        scale = other.abs().amax(1, keepdim=True)
        assert ((y - other).abs() <= 1e-5 * scale).all()
    broken = x.clone()
    broken[0, 5], broken[1, 6] = float("nan"), float("inf")
    (y,) = torch.ops.bitfold.fused([broken, *inputs[1:]], str(spec))
    assert y[0].isnan().all() and not y[1].isfinite().any() and y[2:].isfinite().all()


def test_one_row_that_has_digits_and_is_read_in_panels(compiled: None) -> None:
    """Numbers so large that sums of codes might pass float32, where values do not."""
    spec = pair("int4[g64]")
    build.know([spec], TILES)
    inputs = operands(spec, 1, seed=4)
    inputs[2].mul_(2.0**-8)
    inputs[0][0, 5] = 3e38
    want, _ = expected(spec, inputs)
    (y,) = torch.ops.bitfold.fused(inputs, str(spec))
    assert (y.double() - want).norm() <= 1e-5 * want.norm()


CONVS = {
    "three by three, tiles that end within": (
        "40x20x3x3 p1x1 zero bias -> relu(y0) y:int8[tensor]",
        (2, 20, 9, 7),
    ),
    "groups, a stride": ("40x24x3x3 s2x2 p1x1 g2", (1, 48, 13, 11)),
    "rows of a product": ("72x96 + bias -> relu(y0) y:int8[tensor]", (5, 16, 96)),
    "rows that no four divides": ("24x50 zero", (37, 50)),
    "a length that no tile divides": ("16x76 bias", (40, 76)),
}


@pytest.mark.parametrize(
    "case", [case if i < 2 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(CONVS)]
)
def test_convolutions(case: str) -> None:
    text, shape = CONVS[case]
    spec = spec_of(text)
    check_conv(spec, operands_of_conv(spec, shape), TILES)


def test_without_leave_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not use tiles is told once, and has kernels without."""
    widest.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    try:
        with pytest.warns(UserWarning, match="the system does not let this process use it"):
            assert widest() == VECTORS["avx512vnni"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert widest() == VECTORS["avx512vnni"]
    finally:
        widest.cache_clear()
