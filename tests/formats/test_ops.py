"""The operators: one node in a graph, the same bits eagerly, exported, saved, compiled and on fakes."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bitfold.formats import FormatError, format

ops = torch.ops.bitfold
TRACED = [
    "int8",
    "int4[g32]",
    "uint4[g32,zero]",
    "q4_1",
    "int3[g32,planar]",
    "mxfp4",
    "nvfp4",
    "nf4[g32]",
    "ternary",
]
TRACED += ["int4[g32,2:4]", "float8_e4m3fn", "float8_e5m2[tensor]", "float5_e2m2", "mxint8", "int1[g32]"]
# Compiling and decomposing cost seconds each on two cores; these take the paths of the arithmetic once.
QUICK = ["uint4[g32,zero]", "mxfp4", "nf4[g32]"]
QUICK_AND_SLOW = [*QUICK, *(pytest.param(t, marks=pytest.mark.slow) for t in TRACED if t not in QUICK)]


class Everything(torch.nn.Module):
    """Every operator once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = ops.quantize(x, self.text)
        back = ops.dequantize(parts, self.text, x.shape[-1], x.dtype)
        codes = ops.unpack(parts[0], self.text, x.shape[-1])
        packed = ops.pack(codes, self.text)
        params = ops.choose(x, self.text)
        fixed = ops.quantize(x, self.text, params)
        return (back, ops.fake_quantize(x, self.text), codes, packed, *parts, *params, *fixed)


class ThereAndBack(torch.nn.Module):
    """The two operators that a lowered graph holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def forward(self, x: Tensor, params: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        parts = ops.quantize(x, self.text, params)
        return (ops.dequantize(parts, self.text, x.shape[-1], x.dtype), *parts)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit (fp8 tensors do not compare)."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("text", TRACED)
def test_the_operators_do_what_the_format_does(text: str) -> None:
    f, x = format(text), torch.randn(6, 64)
    q = f.quantize(x)
    back, fake, codes, packed, *parts = Everything(text)(x)
    assert same(back, q.dequantize()) and same(fake, q.dequantize())
    assert same(codes, f.unpack(q.codes, 64)) and same(packed, q.codes)
    stored = [*q.parts, *f.choose(x), *q.parts]
    assert len(parts) == len(stored) and all(same(a, b) for a, b in zip(parts, stored, strict=True))


def test_an_operator_stays_one_node() -> None:
    graph = make_fx(Everything("int4[g32]"), pre_dispatch=True)(torch.randn(4, 64))
    calls = [n.target for n in graph.graph.nodes if n.op == "call_function" and "bitfold" in str(n.target)]
    assert calls == [
        ops.quantize.default,
        ops.dequantize.default,
        ops.unpack.default,
        ops.pack.default,
        ops.choose.default,
        ops.quantize.default,
        ops.fake_quantize.default,
    ]


@pytest.mark.parametrize("text", QUICK_AND_SLOW)
def test_export_save_load_decompose(text: str) -> None:
    module, x = ThereAndBack(text), torch.randn(6, 64)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    names = [
        str(n.target) for n in program.graph.nodes if n.op == "call_function" and "bitfold" in str(n.target)
    ]
    assert names == ["bitfold.quantize.default", "bitfold.dequantize.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    other = torch.randn(3, 64)
    want = module(other)
    assert all(same(a, b) for a, b in zip(loaded.module()(other), want, strict=True))
    plain = loaded.run_decompositions()
    assert not any("bitfold" in str(n.target) for n in plain.graph.nodes)
    assert all(same(a, b) for a, b in zip(plain.module()(other), want, strict=True))


@pytest.mark.parametrize("text", QUICK_AND_SLOW)
def test_compiled_for_any_batch(text: str) -> None:
    """Inductor's C++ gives the same bits: it does not contract a multiply and an add into one rounding.

    Only a mean is summed in another order there, so formats that take one are given their scales.
    """
    module = ThereAndBack(text)
    means = format(text).scale is not None and format(text).scale.rule == "absmean"
    compiled = torch.compile(module, fullgraph=True)
    for i, rows in enumerate((5, 9)):
        x = torch.randn(rows, 64)
        torch._dynamo.mark_dynamic(x, 0)
        params = ops.choose(x, text) if means else None
        for p in params or ():
            torch._dynamo.mark_dynamic(p, 0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = compiled(x, params)
        assert all(same(a, b) for a, b in zip(got, module(x, params), strict=True)), rows


def test_compiled_with_every_size_symbolic() -> None:
    module = ThereAndBack("int8")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for shape in ((5, 64), (9, 48)):
        x = torch.randn(shape)
        assert all(same(a, b) for a, b in zip(compiled(x), module(x), strict=True)), shape


@pytest.mark.parametrize("text", TRACED)
def test_fake_tensors_have_the_real_shapes(text: str) -> None:
    module, x = Everything(text), torch.randn(6, 64)
    with FakeTensorMode() as mode:
        faked = module(mode.from_tensor(x))
    for fake, real in zip(faked, module(x), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("text", ["q4_1"])
def test_opcheck(text: str) -> None:
    x = torch.randn(4, 64)
    parts = ops.quantize(x, text)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.quantize.default, (x, text), test_utils=tests)
    torch.library.opcheck(ops.choose.default, (x, text), test_utils=tests)
    torch.library.opcheck(ops.dequantize.default, (parts, text, 64, torch.float32), test_utils=tests)
    torch.library.opcheck(ops.fake_quantize.default, (x.requires_grad_(), text), test_utils=tests)
    codes = ops.unpack(parts[0], text, 64)
    torch.library.opcheck(ops.unpack.default, (parts[0], text, 64), test_utils=tests[:2])
    torch.library.opcheck(ops.pack.default, (codes, text), test_utils=tests[:2])


@pytest.mark.parametrize("text", ["int4[g32]", "float8_e4m3fn", "nvfp4", "int4[g32,2:4]", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_is_exact_and_straight_through(text: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 64, dtype=dtype, requires_grad=True)
    y = ops.fake_quantize(x, text)
    assert torch.equal(y, format(text).quantize(x.detach()).dequantize(dtype))
    weight = torch.randn(6, 64, dtype=dtype)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_straight_through_under_compile() -> None:
    compiled = torch.compile(lambda x: ops.fake_quantize(x, "int4[g32]") * 3, fullgraph=True)
    x = torch.randn(6, 64, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, format("int4[g32]").fake_quantize(x.detach()) * 3)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((6, 64), 3.0))


def test_gradients_reach_learned_scales_through_dequantize() -> None:
    codes, scales = ops.quantize(torch.randn(4, 64), "int4[g32,f32]")
    scales = scales.requires_grad_()
    ops.dequantize([codes, scales], "int4[g32,f32]", 64, torch.float32).sum().backward()
    want = format("int4").element.decode(ops.unpack(codes, "int4[g32,f32]", 64)).view(4, 2, 32).sum(-1)
    assert torch.equal(scales.grad, want)


def test_static_parameters_are_used() -> None:
    x = torch.randn(4, 64)
    params = [p * 2 for p in ops.choose(x, "int8[tensor]")]
    codes, scales = ops.quantize(x * 100, "int8[tensor]", params)
    assert torch.equal(scales, params[0])
    assert torch.equal(codes, ops.quantize(x * 100, "int8[tensor]", [scales])[0])
    assert torch.equal(codes.view(torch.int8).float(), (x * 100 * (1 / scales)).round().clamp(-128, 127))


def test_a_wrong_format_is_an_error_of_use() -> None:
    with pytest.raises(FormatError, match="did you mean 'int4'"):
        ops.quantize(torch.randn(2, 64), "int44")
    with pytest.raises(FormatError, match="does not divide"):
        ops.quantize(torch.randn(2, 64), "int4[g48]")


@pytest.mark.parametrize("text", ["int8", "float8_e4m3fn[tensor]", "nvfp4"])
def test_a_gradient_through_codes_is_an_error_and_not_a_wrong_number(text: str) -> None:
    x = torch.randn(6, 64, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return ops.dequantize(ops.quantize(x * 1, text), text, 64, torch.float32)

    for run in (forward, torch.compile(forward, backend="aot_eager")):
        out = run(x)  # a forward with grad mode on is no mistake
        with pytest.raises(FormatError, match="no gradient goes through a tensor quantized to"):
            out.sum().backward()
    assert x.grad is None


def test_codes_of_bytes_alone_say_that_they_end_the_gradient() -> None:
    with pytest.warns(UserWarning, match="no gradient goes through a tensor quantized to mxfp4"):
        parts = ops.quantize(torch.randn(2, 64, requires_grad=True), "mxfp4")
    assert not any(part.requires_grad for part in parts)
