"""Values of whole CPU kernels against float64: formats x activations x shapes x epilogues x vectors.

    linear 13x192 f32 uint4[g32,zero,planar64] bias, M = 5   ->   y within `bound`

The cases' formats are those of the Triton kernels' tests. Rows of x have four numbers each, or all. That
nothing is read behind the last row of codes is seen by the sanitizers (`test_cpp_sanitized.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfold.codegen import CodegenError, GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.cpp.body import Body
from bitfold.codegen.cpp.support import cpu_layout, obstacle
from bitfold.codegen.cpp.vectors import runnable
from bitfold.codegen.epilogue import OPS, Apply, Epilogue
from bitfold.formats import Codebook, Format, Quantized, Scale, format
from bitfold.formats.granularity import Granularity

U = 2.0**-24
FAST = [
    "int4[g64]", "int4", "int8", "int3[g64]", "uint4[g32,zero]", "uint2[g64,f16,zero:min]", "uint3[zero]",
    "mxfp4", "nvfp4", "nf4[g64]", "float8_e4m3fn", "float6_e2m3[16x32,f32]",
]  # fmt: skip
MORE = [
    "int2[g32]", "int4[g128]", "int4[g64,e4m3]", "int4[unscaled]", "int6", "int8[g32,f32]", "int8[128x128]",
    "int8f6[g32,e8m0]", "uint4[g128,zero:float]", "uint4[tensor,zero]", "uint4[g48,f32,zero:min]", "mxfp8",
    "float8_e4m3fn[g64,e4m3,two_level]", "float8_e5m2fnuz", "float4_e2m1b30[g32,f32]", "ternary", "int1[g32]",
    "int4[g16,f16]", "int4[tensor]", "int5[g32,f32]", "int7[g64,f16]", "uint1[g32,zero]", "uint8[g16,zero]",
    "mxfp6_e3m2", "float8_e5m2[g32]", "float5_e2m2[g64]", "float8_e5m2b0", "int1_twos",
]  # fmt: skip
INTEGERS = [
    "int8 x int8", "int4[g64] x int8", "int4 x int8", "uint4[g64,zero] x int8", "uint8[zero] x int8[tensor]",
    "int3[g64] x int8", "uint4[zero:float] x int8", "int8[32x32] x int8[g32,f32]", "int6[unscaled] x int8",
    "uint2[g32,f16,zero:min] x int8",
]  # fmt: skip


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sizes(f: Format, activation: Format | None = None) -> tuple[int, int]:
    """N and K that are no whole tiles, as far as the groups let them."""
    held = [g.scale.granularity for g in (f, activation) if g is not None and g.scale is not None]
    cols = max((grain.cols or 1 for grain in held), default=1)
    rows = max((grain.rows or 1 for grain in held), default=1)
    return -(-13 // rows) * rows, -(-200 // cols) * cols


def laid(text: str, activation: Format | None = None) -> GemmSpec:
    f = format(text)
    n, k = sizes(f, activation)
    found = cpu_layout(f, k, activation)
    assert found is not None, text
    return GemmSpec(found, n, k, "f32", activation=activation)


def pair(text: str) -> GemmSpec:
    weight, _, activation = text.partition(" x ")
    return laid(weight, format(activation) if activation else None)


def operands(spec: GemmSpec, m: int, seed: int) -> list[Tensor]:
    x = drawn(m, spec.k, seed=seed)
    for i in range(seed % 2, m, 2):
        mask = torch.ones(spec.k, dtype=torch.bool)
        mask[torch.randperm(spec.k, generator=torch.Generator().manual_seed(seed + i))[:4]] = False
        x[i, mask] = 0
    found = [x.to(spec.dtype)] if spec.activation is None else list(spec.activation.quantize(x).parts)
    for which in range(spec.weights):
        weight = drawn(spec.n, spec.k, seed=seed + 10 + which) * (0.5 + torch.arange(spec.n) % 3)[:, None]
        found += spec.weight.quantize(weight).parts
    found += [drawn(spec.n, seed=seed + 20 + i).to(spec.dtype) for i in range(spec.weights * spec.bias)]
    found += [drawn(m, spec.n, seed=seed + 30 + i).to(spec.dtype) for i in range(spec.epilogue.count("e"))]
    return found + [drawn(spec.n, seed=seed + 40 + i).to(spec.dtype) for i in range(spec.epilogue.count("v"))]


def evaluated(of: object, given: dict[str, Tensor]) -> Tensor:
    if isinstance(of, Apply):
        return OPS[of.op].run(*(evaluated(operand, given) for operand in of.operands))
    return given[of] if isinstance(of, str) else of  # type: ignore[return-value]


def expected(spec: GemmSpec, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(y, bound) in float64. A sum of K products and its scaling lose at most (2 K + 32) u sum |x| |w| in
    float32, with offsets and codes taken apart where they cancel; an epilogue four times its slope's."""
    told = spec.inputs(inputs)
    x = told.x.double()
    if spec.activation is not None:
        assert told.x_scales is not None
        x = Quantized.from_parts(spec.activation, [told.x, told.x_scales], spec.k).dequantize(torch.float64)
    named, moved = {}, {}
    for i, parts in enumerate(told.parts):
        q = Quantized.from_parts(spec.weight, parts, spec.k)
        w = q.dequantize(torch.float64)
        apart = w.abs()
        if Body(spec).needs_sums:
            scale = (
                torch.ones(())
                if q.scales is None
                else spec.weight.scale.decode(q.scales).double().abs().max()
            )  # type: ignore[union-attr]
            apart = apart + 2 * (spec.weight.element.high - spec.weight.element.low) * scale
        y = x @ w.T
        bias = told.biases[i].double() if spec.bias else torch.zeros(())
        named[f"y{i}"] = y + bias
        moved[f"y{i}"] = (2 * spec.k + 32) * U * (x.abs() @ apart.T + bias.abs())
    matrices = spec.epilogue.count("e")
    named |= {f"e{i}": extra.double() for i, extra in enumerate(told.extras[:matrices])}
    named |= {
        f"v{i}": extra.double().expand(x.shape[0], -1) for i, extra in enumerate(told.extras[matrices:])
    }
    leaves = {name: value.clone().requires_grad_() for name, value in named.items()}
    y = evaluated(spec.epilogue.root, leaves)
    if not isinstance(spec.epilogue.root, str):
        y.sum().backward()
    bound = sum(
        (
            moved[name] * (1 if leaf.grad is None else 4 * leaf.grad.abs() + 1e-3)
            for name, leaf in leaves.items()
            if name in moved
        ),
        start=torch.zeros(()),
    )
    y = y.detach()
    largest = torch.stack([value.abs() for value in named.values()]).amax(0)
    r = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[spec.out]
    return y, bound + 32 * U * (largest + 1) * (not spec.epilogue.plain) + r * y.abs() + 2.0**-24 * (r > 0)


def check(spec: GemmSpec, m: int, seed: int = 0, vectors: str | None = None) -> None:
    why = obstacle(spec)
    assert why is None, why
    build.know([spec], vectors)
    inputs = operands(spec, m, seed)
    (y,) = torch.ops.bitfold.fused(inputs, str(spec))
    want, bound = expected(spec, inputs)
    assert y.dtype == spec.out and y.shape == (m, spec.n)
    error = (y.double() - want).abs()
    assert (error <= bound).all(), f"{spec}, M={m}: {(error / bound).nan_to_num(0).max():.3g} tolerances"


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
    if vectors not in runnable():
        pytest.skip("needs AVX2")
    specs = [
        pair(text) for text in ("uint4[g32,zero]", "float8_e4m3fn", "nf4[g64]", "int8 x int8", "int4 x int8")
    ]
    build.know(specs, vectors)
    for spec in specs:
        for m in (1, 5):
            check(spec, m, vectors=vectors)


@given(
    text=st.sampled_from([*FAST[:9], *INTEGERS[:3]]),
    m=st.integers(0, 12),
    n=st.integers(1, 70),
    groups=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(compiled: None, text: str, m: int, n: int, groups: int, seed: int) -> None:
    """A kernel serves all sizes: no compiler runs here."""
    weight, _, activation = text.partition(" x ")
    k = 64 * groups + (8 if format(weight).scale.granularity.cols is None and not activation else 0)  # type: ignore[union-attr]
    act = format(activation) if activation else None
    f = format(weight).with_layout(pair(text).weight.layout)
    check(GemmSpec(f, n, k, "f32", activation=act), m, seed)


@pytest.mark.parametrize("vectors", ["widest", "avx2"])
def test_sums_of_integers_are_exact(vectors: str) -> None:
    """Where a saturating product of bytes would not be, nor sums of 16 bits: the largest codes everywhere."""
    here = runnable()[0] if vectors == "widest" else vectors
    if here not in runnable():
        pytest.skip("needs AVX2")
    k, act = 4096, format("int8")
    cases = [
        GemmSpec(f, 24, k, "f32", activation=act)
        for text in ("int8", "int7", "int6", "int5", "int4", "int4[g64]", "int2[g32]")
        if (f := cpu_layout(format(text), k, act)) is not None
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
    build.know(cases)


def test_autocast_changes_no_sum() -> None:
    """Of few rows of x, or many: float32, whatever autocast says."""
    spec = pair("int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(spec, 40)


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


@pytest.mark.parametrize("text", ["int4[g64]", "uint4[g32,zero]", "uint2[g64,f16,zero:min]", "uint3[zero]"])
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


NO_KERNELS = [
    ("grouped 4 32x64 f32 int8[bytes]", "have no experts"),
    ("linear 32x64 f32 float8_e4m3fn[bytes] x:int8", "by integers, not by float8_e4m3fn"),
    ("linear 32x64 f32 int8[bytes] x:float8_e4m3fn", "multiply int8, not activations"),
    ("linear 32x64 f32 int4[packed]", "slices of 1 codes"),
    ("linear 32x192 f32 uint4[g96,zero,planar64] x:int8[g64,f32]", "do not divide each other"),
    ("linear 4x70016 f32 int8[bytes] x:int8", "may not fit in 32 bits"),
]


@pytest.mark.parametrize(("text", "says"), NO_KERNELS)
def test_what_no_kernel_computes(text: str, says: str) -> None:
    spec = GemmSpec.parse(text)
    assert says in (obstacle(spec) or "")
    with pytest.raises(CodegenError, match="no CPU kernel"):
        from bitfold.lowering.fused import build_for_cpu

        build_for_cpu([torch.zeros(1, 64)], text)


@pytest.mark.parametrize(("text", "says"), NO_KERNELS)
def test_the_operator_does_not_compute_it_either(compiled: None, text: str, says: str) -> None:
    """Once it is there, it builds what it does not know: the reason is the error's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=f"^no CPU kernel computes .*{says}"):
            torch.ops.bitfold.fused([torch.zeros(1, 64)], text)


@pytest.mark.parametrize("extras", [8, 9, 14])
def test_tensors_that_an_epilogue_reads(extras: int) -> None:
    """Each has a place in the call, of which there are eight."""
    end = "y0"
    for i in range(extras):
        end = f"add({end},{'ev'[i % 2]}{i // 2})"
    f = cpu_layout(format("int8"), 64)
    assert f is not None
    if extras > 8:
        with pytest.raises(CodegenError, match=f"at most 8 tensors beside its sums, not {extras}"):
            GemmSpec(f, 16, 64, "f32", epilogue=Epilogue.parse(end))
        return
    for m in (1, 33):
        check(GemmSpec(f, 16, 64, "f32", epilogue=Epilogue.parse(end)), m)


def test_wrong_operands_are_refused(compiled: None) -> None:
    spec = pair("int8")
    inputs = operands(spec, 2, 0)
    op = torch.ops.bitfold.fused
    for wrong, says in (
        (inputs[:2], "takes 3 tensors, not 2"),
        ([inputs[0][:, :-1], *inputs[1:]], r"takes x \[.., "),
        ([inputs[0].double(), *inputs[1:]], "does not take x in this dtype"),
        ([inputs[0], inputs[1][:-1], inputs[2]], "rows of"),
        ([inputs[0], inputs[1].long(), inputs[2]], "rows of .* bytes"),
        ([inputs[0], inputs[1], inputs[2][:-1]], "reads .* scales"),
        ([inputs[0], inputs[1], inputs[2].double()], "in the dtype that its format stores"),
        ([inputs[0], inputs[1], inputs[2].half()], "in the dtype that its format stores"),
        ([inputs[0].bfloat16(), *inputs[1:]], "does not take x in this dtype"),
    ):
        with pytest.raises(RuntimeError, match=says):
            op(wrong, str(spec))


@pytest.mark.parametrize(
    ("count", "tensors", "says"), [(5, 5, "at most 4 products"), (2, 3, "take 5 tensors, not 7")]
)
def test_calls_beside_one_another_are_counted(compiled: None, count: int, tensors: int, says: str) -> None:
    spec = pair("int8")
    x, *parts = operands(spec, 2, 0)
    with pytest.raises(RuntimeError, match=says):
        torch.ops.bitfold.fused_beside([x, *parts * tensors], " & ".join([str(spec)] * count))
