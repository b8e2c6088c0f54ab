"""Values of convolution kernels against float64: shapes x epilogues x signs of x x vectors.

    conv 7x5x3x3 s2x2 p1x2x0x1 d2x1 .., x [3, 5, 13, 11]   ->   y within `bound`, codes within half a step
    of y

Sums of codes are exact, so what is left is rounding: the sum to float32, the product of the two scales, their
product, and one for the bias. With u = 2**-24 that is at most 4 u (|sum| scales + |bias|), whatever the
length of the sum; an epilogue moves by its slope times as much, and rounds a few times itself.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfold.codegen import CodegenError
from bitfold.codegen.conv import ConvSpec
from bitfold.codegen.cpp.conv_build import know
from bitfold.codegen.cpp.library import Library
from bitfold.codegen.cpp.vectors import CHOICES, VECTORS, Vectors, runnable, widest
from bitfold.codegen.epilogue import OPS, Apply
from bitfold.formats import BitfoldError
from bitfold.lowering.cpu.conv import decoded, reference

sys.path.insert(0, str(Path(__file__).parent))
from conv_cases import coded, operands, spec_of

U = 2.0**-24
HERE = widest()
RUNNABLE = runnable()
SLOW = partial(pytest.param, marks=pytest.mark.slow)
CASES = {
    "one by one": ("20x12x1x1 bias", (1, 12, 5, 5)),
    "three by three": ("64x32x3x3 p1x1 + bias -> relu(y0) y:int8[tensor]", (2, 32, 9, 7)),
    "stride": ("24x16x3x3 s2x2 p1x1 + -> clamp(y0,0.0,6.0) y:f32 y:int8[tensor]", (1, 16, 15, 17)),
    "a stem": ("32x3x7x7 s2x2 p3x3 bias -> relu(y0) y:int8[tensor]", (1, 3, 33, 31)),
    "all at once": ("7x5x3x3 s2x2 p1x2x0x1 d2x1 bias -> add(mul(y0,v0),e0) e:int8[tensor]", (3, 5, 13, 11)),
    "groups": ("20x6x3x3 p1x1 g2 bias -> relu(y0)", (1, 12, 6, 5)),
    "narrow groups": ("12x5x1x1 g4 + -> y0 y:int8[tensor]", (2, 20, 4, 4)),
    "depthwise": ("32x1x3x3 p1x1 g32 bias -> hardswish(y0) y:int8[tensor]", (1, 32, 8, 9)),
    "depthwise, odd": ("19x1x5x5 s2x2 p2x2 g19 + bias -> relu(y0) y:int8[tensor]", (2, 19, 9, 6)),
    "depthwise, several": ("12x1x5x3 s1x2 p2x1 g6", (2, 6, 7, 7)),
    "dilated depthwise": ("16x1x3x3 p2x2 d2x2 g16 + -> y0 y:int8[tensor]", (1, 16, 7, 7)),
    "one dimension": ("9x4x1x3 p0x1 d1x2 bias -> silu(y0) y:f32 y:int8[tensor]", (2, 4, 11)),
    "a product": ("10x785 bias", (3, 785)),
    "a wide product": ("72x64 + bias -> relu(y0) y:int8[tensor]", (2, 5, 64)),
    "residual": ("16x16x3x3 p1x1 + bias -> relu(add(y0,e0)) e:f32 y:f32 y:int8[tensor]", (1, 16, 6, 6)),
    "one scale": ("33x8x3x3 p1x1 tensor bias -> y0 y:int8[tensor]", (1, 8, 4, 4)),
    "zero points": ("64x32x3x3 p1x1 zero bias -> relu(y0) y:int8[tensor,zero]", (2, 32, 9, 7)),
    "zero points, a stem": (
        "32x3x7x7 s2x2 p3x3 zero bias -> relu(y0) y:f32 y:int8[tensor,zero]",
        (1, 3, 33, 31),
    ),
    "zero points, depthwise": ("35x1x3x3 p1x1 g35 zero -> hardswish(y0) y:int8[tensor,zero]", (1, 35, 8, 9)),
    "zero points, a product": ("72x67 zero bias -> gelu(y0) y:int8[tensor] y:int8[tensor,zero]", (2, 5, 67)),
    "zero points, groups": (
        "20x6x3x3 p1x2x0x1 g2 zero -> add(mul(y0,v0),e0) e:int8[tensor,zero]",
        (2, 12, 6, 5),
    ),
    "two results in codes": ("8x8x1x1 -> y0 y:int8[tensor] y:int8[tensor]", (1, 8, 3, 3)),
}


def evaluated(of: object, named: dict[str, Tensor]) -> Tensor:
    if isinstance(of, Apply):
        return OPS[of.op].run(*(evaluated(operand, named) for operand in of.operands))
    return named[of] if isinstance(of, str) else of  # type: ignore[return-value]


def check(spec: ConvSpec, inputs: list[Tensor], vectors: Vectors) -> None:
    know([spec], vectors)
    compare(spec, inputs, torch.ops.bitfold.conv(inputs, str(spec)))


def compare(spec: ConvSpec, inputs: list[Tensor], results: list[Tensor]) -> None:
    told, plain = spec.inputs(inputs), spec.plain()
    exact = reference(inputs[: plain.arity], str(plain), torch.float64)[0]
    shape = (-1, *(1,) * (exact.ndim - 2)) if spec.kernel else (-1,)
    bias = torch.zeros(()) if told.bias is None else told.bias.double().reshape(shape)
    # And what the float64 it is held against rounds: a sum that is 0 is 1e-17 there.
    moved = 4 * U * ((exact - bias).abs() + bias.abs()) + 2.0**-45 * exact.abs().sum()
    named = {"y0": exact.requires_grad_()}
    for i, (f, extra) in enumerate(zip(spec.reads, told.extras, strict=True)):
        named[f"e{i}"] = extra[0].double() if f is None else decoded(f, extra, torch.float64)
    named |= {f"v{i}": vector.double().reshape(shape) for i, vector in enumerate(told.vectors)}
    y = evaluated(spec.epilogue.root, named)
    slope = torch.ones(())
    if not spec.epilogue.plain and y.numel():
        slope = torch.autograd.grad(y.sum(), exact)[0].abs() + 1e-3
    y = y.detach()
    largest = torch.stack([value.detach().abs().expand(y.shape) for value in named.values()]).amax(0)
    bound = slope * moved + (not spec.epilogue.plain) * 16 * U * (largest + 1)
    scales = iter(told.scales)
    for f, got in zip(spec.writes, results, strict=True):
        assert got.shape == y.shape
        if f is None:
            assert got.dtype == torch.float32 and bool(((got.double() - y).abs() <= bound).all())
            continue
        step, *zero = (one.double() for one in next(scales))
        wanted = (y / step + (zero[0] if zero else 0)).clamp(-128, 127)
        off = (got.view(torch.int8).double() - wanted).abs()
        assert bool((off <= 0.5 + bound / step + 2 * U * wanted.abs()).all()), float(off.max())


@pytest.mark.parametrize(
    "vectors", [v if v in (HERE, VECTORS["avx2"]) else SLOW(v) for v in RUNNABLE], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, vectors: Vectors) -> None:
    text, shape = CASES[case]
    spec = spec_of(text)
    check(spec, operands(spec, shape), vectors)


@pytest.mark.parametrize("vectors", RUNNABLE, ids=str)
def test_a_kernel_has_the_vectors_that_are_named(vectors: Vectors) -> None:
    """Those of convolutions choose by what the compiler may use, whatever the processor here has."""
    found = [f"#ifdef {macro}\n  found |= {1 << i};\n#endif" for i, macro in enumerate(CHOICES)]
    text = [
        "#include VECTORS",
        'extern "C" int run() {',
        "  int found = 0;",
        *found,
        "  return found;",
        "}\n",
    ]
    macros = Library("\n".join(text), vectors).loaded(ctypes.CDLL).run()
    assert {macro for i, macro in enumerate(CHOICES) if macros >> i & 1} == vectors.macros


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 21), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    image=st.tuples(st.integers(0, 3), st.integers(7, 12), st.integers(7, 12)),
    kind=st.sampled_from([[], ["+"], ["zero"]]),
)
def test_any_shape(sizes, kernel, stride, padding, dilation, image, kind) -> None:  # type: ignore[no-untyped-def]
    groups, k, rows = sizes
    words = [f"{rows * groups}x{k}x{kernel[0]}x{kernel[1]}"]
    words += [f"s{stride[0]}x{stride[1]}"] * (stride != (1, 1))
    same = padding[:2] == padding[2:]
    words += ["p" + "x".join(map(str, padding[:2] if same else padding))] * any(padding)
    words += [f"d{dilation[0]}x{dilation[1]}"] * (dilation != (1, 1))
    words += [f"g{groups}"] * (groups > 1) + kind
    spec = spec_of(" ".join(words))
    check(spec, operands(spec, (image[0], k * groups, *image[1:]), seed=k), HERE)


@settings(max_examples=25)
@given(
    channels=st.integers(2, 40),
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 9)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    image=st.tuples(st.integers(1, 2), st.integers(17, 19), st.integers(19, 23)),
    vectors=st.sampled_from([v for v in RUNNABLE if v in (HERE, VECTORS["avx2"])]),
)
def test_any_depthwise_shape(channels, kernel, stride, padding, dilation, image, vectors) -> None:  # type: ignore[no-untyped-def]
    """Codes that are not negative, four taps at a time: kernels whose rows are no fours, wide margins."""
    words = [f"{channels}x1x{kernel[0]}x{kernel[1]}"]
    words += [f"s{stride[0]}x{stride[1]}"] * (stride != (1, 1))
    same = padding[:2] == padding[2:]
    words += ["p" + "x".join(map(str, padding[:2] if same else padding))] * any(padding)
    words += [f"d{dilation[0]}x{dilation[1]}"] * (dilation != (1, 1))
    spec = spec_of(" ".join([*words, f"g{channels}", "+"]))
    check(spec, operands(spec, (image[0], channels, *image[1:]), seed=channels), vectors)


@pytest.mark.parametrize("vectors", RUNNABLE, ids=str)
@pytest.mark.parametrize("sizes", ["16x64x3x3", "16x1x5x5 g16"])
@pytest.mark.parametrize("sign", ["+ ", ""])
def test_extreme_codes_do_not_saturate(vectors: Vectors, sign: str, sizes: str) -> None:
    """Sums of the largest products: with pairs in 16 bits that saturate, these would be other numbers."""
    spec = spec_of(f"{sizes} {sign}".strip())
    inputs = operands(spec, (1, spec.k * spec.groups, 5, 5))
    inputs[0] = torch.full_like(inputs[0], 127 if spec.positive else 128)
    inputs[2] = torch.full_like(inputs[2], 128)
    inputs[1], inputs[3] = torch.ones(1), torch.ones_like(inputs[3])
    know([spec], vectors)
    (y,) = torch.ops.bitfold.conv(inputs, str(spec))
    wanted = spec.products * -128 * (127 if spec.positive else -128)
    assert bool((y == wanted).all())


def test_both_ways_to_end_a_sum_give_the_same_bits() -> None:
    """In registers, and as the loop that ends of fewer channels take: the last of 40 channels are alone."""
    for end in ("relu(add(y0,e0)) e:f32 y:int8[tensor]", "clamp(y0,0.0,6.0) y:int8[tensor]",
                "sub(mul(y0,v0),e0) e:int8[tensor,zero] y:f32 y:int8[tensor,zero]"):  # fmt: skip
        whole = spec_of(f"48x20x1x1 bias -> {end}")
        inputs = operands(whole, (1, 20, 9, 9))
        know([whole], HERE)
        wanted = torch.ops.bitfold.conv(inputs, str(whole))
        for n in (35, 40, 43):
            part = spec_of(f"{n}x20x1x1 bias -> {end}")
            weight = part.weight.pack(whole.weight.unpack(inputs[2], 20)[:n])
            fewer = [
                x[:, :n] if x.ndim == 4 and x.shape[1] == 48 else x[:n] if x.shape[0] == 48 else x
                for x in inputs
            ]
            fewer[2] = weight
            know([part], HERE)
            for got, all_of in zip(torch.ops.bitfold.conv(fewer, str(part)), wanted, strict=True):
                assert torch.equal(got, all_of[:, :n])


@pytest.mark.parametrize("vectors", RUNNABLE, ids=str)
def test_what_is_no_number_becomes_code_0_and_what_is_too_large_the_last(vectors: Vectors) -> None:
    spec = spec_of("8x4 bias -> y0 y:int8[tensor]")
    inputs = operands(spec, (2, 4))
    bias = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, 2.5, -3.5]
    inputs[4], inputs[5] = torch.tensor(bias), torch.ones(1)
    inputs[3] = torch.zeros(8, 1)
    know([spec], vectors)
    (y,) = torch.ops.bitfold.conv(inputs, str(spec))
    assert y.view(torch.int8)[0].tolist() == [0, 127, -128, 127, -128, 0, 2, -4]


def test_x_may_lie_in_any_order_and_results_have_channels_innermost() -> None:
    spec = spec_of("24x12x3x3 p1x1 bias -> add(y0,e0) e:f32")
    inputs = operands(spec, (2, 12, 6, 5))
    know([spec], HERE)
    (first,) = torch.ops.bitfold.conv(inputs, str(spec))
    assert first.is_contiguous(memory_format=torch.channels_last)
    for order in (torch.channels_last, torch.contiguous_format):
        others = [t.contiguous(memory_format=order) if t.ndim == 4 else t for t in inputs]
        others[0] = others[0].repeat(1, 1, 1, 2)[..., :5]
        (again,) = torch.ops.bitfold.conv(others, str(spec))
        assert torch.equal(first, again)
    fake = torch.ops.bitfold.conv([t.to("meta") for t in inputs], str(spec))[0]
    assert fake.shape == first.shape and fake.stride() == first.stride()


def test_threads_give_the_same() -> None:
    spec = spec_of("48x32x3x3 p1x1 bias -> relu(y0) y:int8[tensor]")
    inputs = operands(spec, (2, 32, 24, 24))
    know([spec], HERE)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (one,) = torch.ops.bitfold.conv(inputs, str(spec))
        torch.set_num_threads(3)
        (three,) = torch.ops.bitfold.conv(inputs, str(spec))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


GIVEN_BACK = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
from conv_cases import operands, spec_of
from bitfold.codegen.cpp.conv_build import know

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

spec = spec_of("4x3x1x1 s16x16")
know([spec])
small = operands(spec, (1, 3, 16, 16))
large = [small[0].repeat(1, 1, 256, 256).contiguous(), *small[1:]]
torch.ops.bitfold.conv(small, str(spec))
before = resident()
torch.ops.bitfold.conv(large, str(spec))
with_large = resident() - before
torch.ops.bitfold.conv(small, str(spec))
print(with_large >> 20, (resident() - before) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_what_a_large_call_took_is_given_back() -> None:
    """By the next small one of the same thread: x that lies otherwise is copied, 48 MB of it. In a process of
    its own, since a heap that has such a hole already does not grow."""
    command = [sys.executable, "-c", GIVEN_BACK, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with_large, after = map(int, done.stdout.split())
    assert with_large > 40 and after < 20


BAD = {
    "too few": (lambda inputs: inputs[:-1], "takes 6 tensors"),
    "channels": (lambda inputs: [inputs[0][:, :3], *inputs[1:]], "4 channels of codes"),
    "floats": (lambda inputs: [inputs[0].float(), *inputs[1:]], "codes as uint8"),
    "one image": (lambda inputs: [inputs[0][0, 0], *inputs[1:]], "takes x "),
    "a line": (lambda inputs: [inputs[0][:, :, 0], *inputs[1:]], "is of two dimensions"),
    "small": (lambda inputs: [inputs[0][..., :1, :1], *inputs[1:]], "larger than its padded image"),
    "scale": (lambda inputs: [inputs[0], torch.ones(2), *inputs[2:]], "one scale a tensor"),
    "codes": (lambda inputs: [*inputs[:2], inputs[2][:4], *inputs[3:]], "rows of"),
    "bias": (lambda inputs: [*inputs[:4], torch.ones(3), inputs[5]], "one a channel"),
    "residual": (lambda inputs: [*inputs[:5], inputs[5][:, :1]], "of the result's shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_call_takes_is_checked(case: str) -> None:
    spec = spec_of("8x4x3x3 bias -> add(y0,e0) e:f32")
    inputs = operands(spec, (1, 4, 5, 5))
    know([spec], HERE)
    change, says = BAD[case]
    with pytest.raises(RuntimeError, match=says):
        torch.ops.bitfold.conv(change(inputs), str(spec))


def test_a_line_is_no_image() -> None:
    """Padded above and below, a kernel of three rows would fit on one."""
    spec = spec_of("8x4x3x3 p1x1 bias")
    codes, *others = operands(spec, (1, 4, 5, 5))
    for device in ("cpu", "meta"):
        inputs = [one.to(device) for one in (codes[:, :, 0], *others)]
        with pytest.raises((RuntimeError, CodegenError), match="is of two dimensions"):
            torch.ops.bitfold.conv(inputs, str(spec))


def test_no_gradient() -> None:
    spec = spec_of("8x4x3x3 bias")
    inputs = operands(spec, (1, 4, 5, 5))
    know([spec], HERE)
    inputs[4].requires_grad_()
    (y,) = torch.ops.bitfold.conv(inputs, str(spec))
    with pytest.raises(BitfoldError, match="no gradient goes through"):
        y.sum().backward()


def test_texts() -> None:
    for text, _ in CASES.values():
        spec = spec_of(text)
        assert ConvSpec.parse(str(spec)) == spec
    said = str(spec_of("24x16x3x3 s2x2 p1x1 + bias -> relu(add(y0,e0)) e:f32 y:int8[tensor]"))
    assert said == (
        "conv 24x16x3x3 s2x2 p1x1 int8[panels16x4t9] x:+int8[tensor] bias -> relu(add(y0,e0)) e:f32 "
        "y:int8[tensor]"
    )
    for wrong, says in {
        "conv": "no convolution's text",
        said.replace("s2x2 p1x1", "p1x1 s2x2"): "no convolution's text",
        said.replace("e:f32 ", ""): "a format for each tensor",
        said.replace("panels16x4t9", "bytes"): "takes its weight in",
        said.replace("x:+int8[tensor]", "x:int8"): "one scale a tensor",
        said.replace("y:int8[tensor]", "y:int4[tensor]"): "codes of one scale",
        said.replace("24x16x3x3", "24x8000x3x3"): "may not fit in 32 bits",
        said.replace("24x16", "24x16").replace("p1x1", "p1x1 g5"): "do not divide",
        "conv 8x4 s2x2 int8[panels16x4] x:int8[tensor]": "product of rows",
    }.items():
        with pytest.raises(CodegenError, match=says):
            ConvSpec.parse(wrong)


def test_codes_of_a_scale_of_zero() -> None:
    """What a file may hold: everything becomes 0."""
    spec = spec_of("8x4 bias -> y0 y:int8[tensor]")
    inputs = operands(spec, (2, 4))
    inputs[5] = torch.zeros(1)
    know([spec], HERE)
    (y,) = torch.ops.bitfold.conv(inputs, str(spec))
    assert bool((y == 0).all()) and torch.equal(y, reference(inputs, str(spec))[0])
    assert coded(torch.zeros(3))[0].shape == (3,)
