"""Values of whole CPU kernels against float64: formats x activations x shapes x epilogues x vectors.

    linear 13x192 f32 uint4[g32,zero,planar64] bias, M = 5   ->   y within `bound`

That nothing is read behind the last row of codes is seen by the sanitizers (`test_cpp_sanitized.py`).
"""

from __future__ import annotations

import pytest
import torch
from cpp_cases import FAST, INTEGERS, MORE, check, drawn, pair
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build, source
from bitfold.codegen.cpp.support import cpu_layout, obstacle
from bitfold.codegen.cpp.vectors import VECTORS, runnable
from bitfold.codegen.epilogue import Epilogue
from bitfold.formats import Codebook, Format, Scale, format
from bitfold.formats.granularity import Granularity


@pytest.fixture(scope="session")
def compiled() -> None:
    """The kernels of the fast cases, by all cores at once."""
    build.know([pair(text) for text in FAST + INTEGERS[:4]])


@pytest.mark.parametrize("text", [*FAST, *INTEGERS[:4]])
def test_formats(compiled: None, text: str) -> None:
    spec = pair(text)
    for m in (0, 1, 2, 3, 4, 9, 30):
        check(spec, m, seed=m)


@pytest.mark.slow
@pytest.mark.parametrize("text", [*MORE, *INTEGERS[4:]])
def test_more_formats(text: str) -> None:
    spec = pair(text)
    for m in (0, 1, 2, 3, 4, 9, 30):
        check(spec, m, seed=m)


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 11, 16, 200])
def test_codebooks(size: int) -> None:
    table = Codebook(f"book{size}", tuple(drawn(size, seed=2).tolist()))
    f = cpu_layout(Format(table, Scale(Granularity(1, 64), "bf16")), 256)
    assert f is not None
    check(GemmSpec(f, 13, 256, "f32"), 5)


EPILOGUES = [
    ("mul(silu(y0),y1)", 2, "f32", False),
    ("add(mul(gelu_tanh(y0),v0),e0)", 1, "bf16", True),
    ("f32(tanh(y0))", 1, "f16", False),
    ("div(hardswish(y0),add(sigmoid(y1),1.5))", 2, "f32", True),
    ("clamp(sub(gelu(y0),v0),-0.5,inf)", 1, "f32", False),
    ("add(neg(leaky_relu(relu(y0),0.1)),e0)", 1, "bf16", False),
]


@pytest.mark.parametrize(("text", "weights", "x", "bias"), EPILOGUES, ids=[case[0] for case in EPILOGUES])
def test_epilogues(text: str, weights: int, x: str, bias: bool) -> None:
    f = cpu_layout(format("int4[g64]"), 192)
    assert f is not None
    spec = GemmSpec(f, 21, 192, x, bias, weights=weights, epilogue=Epilogue.parse(text))
    for m in (1, 6, 33):
        check(spec, m, seed=m)


@pytest.mark.parametrize("vectors", ["avx2", "portable"])
def test_other_vectors(vectors: str) -> None:
    """Of a wider processor: what others have. The portable ones are right everywhere."""
    if VECTORS[vectors] not in runnable():
        pytest.skip("needs AVX2")
    specs = [
        pair(text) for text in ("uint4[g32,zero]", "float8_e4m3fn", "nf4[g64]", "int8 x int8", "int4 x int8")
    ]
    build.know(specs, VECTORS[vectors])
    for spec in specs:
        for m in (1, 5):
            check(spec, m, vectors=VECTORS[vectors])


@given(
    text=st.sampled_from([*FAST[:9], *INTEGERS[:3]]),
    m=st.integers(0, 12),
    n=st.integers(1, 70),
    groups=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(compiled: None, text: str, m: int, n: int, groups: int, seed: int) -> None:
    """A kernel serves all sizes: no other text is compiled here."""
    weight, _, activation = text.partition(" x ")
    k = 64 * groups + (8 if format(weight).scale.granularity.cols is None and not activation else 0)  # type: ignore[union-attr]
    act = format(activation) if activation else None
    f = format(weight).with_layout(pair(text).weight.layout)
    spec = GemmSpec(f, n, k, "f32", activation=act)
    assert source(spec) == source(pair(text))
    check(spec, m, seed)


@pytest.mark.parametrize("vectors", ["widest", "avx2"])
def test_sums_of_integers_are_exact(vectors: str) -> None:
    """Where a saturating product of bytes would not be, nor sums of 16 bits: the largest codes everywhere."""
    here = runnable()[0] if vectors == "widest" else VECTORS[vectors]
    if here not in runnable():
        pytest.skip("needs AVX2")
    k, act = 4096, format("int8")
    cases = [
        GemmSpec(f, 24, k, "f32", activation=act)
        for text in ("int8", "int7", "int6", "int5", "int4", "int4[g64]", "int2[g32]")
        if (f := cpu_layout(format(text), k, act, vectors=here)) is not None
    ]
    build.know(cases, here)
    for spec, m in [(spec, m) for spec in cases for m in (2, 12)]:
        f, most = spec.weight, 1 << spec.weight.element.bits - 1
        ones = torch.ones_like(f.quantize(torch.ones(24, k)).parts[1])
        for code, x in [(code, x) for code in (most - 1, -most) for x in (127, -128)]:
            codes = torch.full((24, k), code, dtype=torch.int8).view(torch.uint8) & (2 * most - 1)
            xs = torch.full((m, k), x, dtype=torch.int8).view(torch.uint8)
            (y,) = torch.ops.bitfold.fused([xs, torch.ones(m, 1), f.pack(codes), ones], str(spec))
            assert (y == float(k * code * x)).all(), (str(spec), m, code, x)
    build.know([spec for spec in cases if obstacle(spec) is None])  # the widest vectors' again


def test_autocast_changes_no_sum() -> None:
    """Of few rows of x, or many: float32, whatever autocast says."""
    spec = pair("int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(spec, 40)


def test_clamp_with_its_ends_the_wrong_way_round() -> None:
    f = cpu_layout(format("int4[g64]"), 192)
    assert f is not None
    check(GemmSpec(f, 21, 192, "f32", epilogue=Epilogue.parse("clamp(neg(y0),1.0,-1.0)")), 3)


def test_layouts_that_follow_the_row_have_kernels_of_their_own() -> None:
    f = format("int4[planar]")
    specs = [GemmSpec(f, 8, 64, "f32"), GemmSpec(f, 8, 128, "f32")]
    build.know(specs)
    for spec in specs:
        check(spec, 2)
