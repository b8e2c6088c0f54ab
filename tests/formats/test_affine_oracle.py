"""Integers and fp8, scales and codes, bit for bit against torchao's quantization primitives.

Where the two differ on purpose the test says what differs and why.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfold.formats import format

primitives = pytest.importorskip("torchao.quantization.quant_primitives")
MAPPING = primitives.MappingType

SHAPE = (6, 192)
GRANULARITIES = {"tensor": (6, 192), "row": (1, 192), "g32": (1, 32), "3x64": (3, 64)}
INPUTS = {
    "normal": lambda: torch.randn(SHAPE),
    "skewed": lambda: torch.randn(SHAPE).exp() - 0.5,
    "positive": lambda: torch.rand(SHAPE) + 0.1,
    "tiny": lambda: torch.randn(SHAPE) * 1e-37,
    "outlier": lambda: torch.randn(SHAPE).index_fill(1, torch.tensor([7]), 300.0),
    "zeros": lambda: torch.zeros(SHAPE),
}


def codes_and_params(text: str, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(integers of the codes, params) under the format."""
    f = format(text)
    q = f.quantize(x)
    return f.element.decode(f.unpack(q.codes, q.k)), tuple(q.params)


def bounds(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("rule", ["absmax", "noclip"])
def test_symmetric(kind: str, granularity: str, bits: int, rule: str) -> None:
    x, block = INPUTS[kind](), GRANULARITIES[granularity]
    low, high = bounds(bits, True)
    mapping = MAPPING.SYMMETRIC if rule == "absmax" else MAPPING.SYMMETRIC_NO_CLIPPING_ERR
    scale, zero = primitives.choose_qparams_affine(x, mapping, block, torch.int8, low, high)
    want = primitives.quantize_affine(x, block, scale, zero, torch.int8, low, high)
    got, (scales,) = codes_and_params(f"int{bits}[{granularity},f32,{rule}]", x)
    assert torch.equal(scales.flatten(), scale.flatten())
    assert torch.equal(got, want.float())
    f = format(f"int{bits}[{granularity},f32,{rule}]")
    back = primitives.dequantize_affine(want, block, scale, zero, torch.int8, low, high)
    assert torch.equal(f.dequantize(f.quantize(x)), back)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_asymmetric(kind: str, granularity: str, bits: int, signed: bool) -> None:
    x, block = INPUTS[kind](), GRANULARITIES[granularity]
    low, high = bounds(bits, signed)
    dtype = torch.int8 if signed else torch.uint8
    scale, zero = primitives.choose_qparams_affine(x, MAPPING.ASYMMETRIC, block, dtype, low, high)
    want = primitives.quantize_affine(x, block, scale, zero, dtype, low, high)
    name = f"{'' if signed else 'u'}int{bits}{'_twos' if signed and bits == 1 else ''}"
    text = f"{name}[{granularity},f32,zero]"
    got, (scales, zeros) = codes_and_params(text, x)
    assert torch.equal(scales.flatten(), scale.flatten())
    assert torch.equal(zeros.flatten().int(), zero.flatten().int())
    assert torch.equal(got, want.float())
    f = format(text)
    back = primitives.dequantize_affine(want, block, scale, zero, dtype, low, high)
    assert torch.equal(f.dequantize(f.quantize(x)), back)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tinygemm(kind: str, granularity: str, bits: int) -> None:
    x, block = INPUTS[kind](), GRANULARITIES[granularity]
    low, high = bounds(bits, False)
    args = (block, torch.uint8, low, high)
    scale, zero = primitives._choose_qparams_affine_tinygemm(x, MAPPING.ASYMMETRIC, *args)
    want = primitives._quantize_affine_tinygemm(x, block, scale, zero, torch.uint8, low, high)
    text = f"uint{bits}[{granularity},f32,zero:float]"
    got, (scales, zeros) = codes_and_params(text, x)
    assert torch.equal(scales.flatten(), scale.flatten())
    assert torch.equal(zeros.flatten(), zero.flatten())
    assert torch.equal(got, want.float())
    back = primitives._dequantize_affine_tinygemm(want, block, scale, zero, torch.uint8, low, high)
    f = format(text)
    assert torch.equal(f.dequantize(f.quantize(x)), back)


@pytest.mark.parametrize("kind", ["normal", "skewed", "outlier", "zeros"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapping", ["absmax", "noclip", "zero"])
def test_native_arithmetic_is_torchaos_for_half_precision(
    kind: str, dtype: torch.dtype, mapping: str
) -> None:
    """`native` computes in the input's dtype; the scale is kept in that dtype."""
    x, block = INPUTS[kind]().to(dtype), GRANULARITIES["g32"]
    short = "bf16" if dtype is torch.bfloat16 else "f16"
    kinds = {
        "absmax": MAPPING.SYMMETRIC,
        "noclip": MAPPING.SYMMETRIC_NO_CLIPPING_ERR,
        "zero": MAPPING.ASYMMETRIC,
    }
    scale, zero = primitives.choose_qparams_affine(x, kinds[mapping], block, torch.int8, -8, 7)
    want = primitives.quantize_affine(x, block, scale, zero, torch.int8, -8, 7)
    text = f"int4[g32,{short},{mapping},native]"
    got, params = codes_and_params(text, x)
    assert torch.equal(params[0].flatten(), scale.flatten())
    assert torch.equal(got, want.float())
    back = primitives.dequantize_affine(want, block, scale, zero, torch.int8, -8, 7, output_dtype=dtype)
    f = format(text)
    assert torch.equal(f.dequantize(f.quantize(x), dtype), back)


def test_default_arithmetic_is_float32_with_the_rounded_scale() -> None:
    """What `quantized_decomposed` does and torchao does not: half precision is widened first."""
    x = torch.randn(SHAPE, dtype=torch.bfloat16)
    f = format("int4[g32,bf16]")
    q = f.quantize(x)
    scale = (x.float().view(6, 6, 32).abs().amax(-1) / 7.5).bfloat16()
    assert torch.equal(q.scales, scale)
    want = (x.float().view(6, 6, 32) * (1 / scale.float())[..., None]).round().clamp(-8, 7)
    assert torch.equal(f.element.decode(f.unpack(q.codes, 192)), want.view(SHAPE))
    back = (want * scale.float()[..., None]).view(SHAPE)
    assert torch.equal(f.dequantize(q, torch.bfloat16), back.bfloat16())


@pytest.mark.parametrize("kind", [k for k in INPUTS if k != "zeros"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(kind: str, granularity: str, name: str) -> None:
    x, block, dtype = INPUTS[kind](), GRANULARITIES[granularity], getattr(torch, name)
    f = format(f"{name}[{granularity},f32]")
    q = f.quantize(x)
    scale = primitives._choose_scale_float8(x, block, dtype)
    # Scales below the smallest normal float32 are held at it here (their reciprocals are infinite).
    assert torch.equal(q.scales, scale.clamp(min=torch.finfo(torch.float32).tiny))
    want = primitives._quantize_affine_float8(x, q.scales, dtype)
    assert torch.equal(q.codes, want.view(torch.uint8))
    assert torch.equal(f.dequantize(q), primitives._dequantize_affine_float8(want, q.scales))


def test_float8_training_scales() -> None:
    """Power-of-two scaling of float8 training: the multiplier is exp2(floor(log2(448 / amax)))."""
    x = torch.randn(64, 192) * torch.logspace(-6, 6, 64)[:, None]
    f = format("float8_e4m3fn[pow2]")
    q = f.quantize(x)
    multiplier = torch.exp2(torch.floor(torch.log2(448.0 / x.abs().amax(-1, keepdim=True).double()))).float()
    assert torch.equal(q.scales, 1 / multiplier)
    want = (x * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.codes, want.view(torch.uint8))


def test_int1_symmetric_is_a_sign_bit_and_the_public_one_can_be_had() -> None:
    x = torch.randn(SHAPE)
    scale, zero = primitives.choose_qparams_affine(x, MAPPING.SYMMETRIC, (1, 32), torch.int8, -1, 0)
    want = primitives.quantize_affine(x, (1, 32), scale, zero, torch.int8, -1, 0)
    got, (scales,) = codes_and_params("int1_twos[g32,f32]", x)
    assert torch.equal(scales, scale) and torch.equal(got, want.float())
    assert want.count_nonzero() == 0  # the public definition keeps nothing of x
    sign, (mean,) = codes_and_params("int1[g32,f32]", x)
    assert torch.equal(sign, torch.where(x >= 0, 1.0, -1.0))
    torch.testing.assert_close(mean, x.view(6, 6, 32).abs().mean(-1), rtol=1e-6, atol=0)


def test_unsigned_symmetric_spans_zero_to_the_maximum() -> None:
    """torchao's symmetric uint4 is int4 with codes moved by 8; here nothing is below 0."""
    x = torch.rand(SHAPE)
    got, (scales,) = codes_and_params("uint4[g32,f32]", x)
    blocks = x.view(6, 6, 32)
    assert torch.equal(scales, blocks.amax(-1) / 15)
    assert torch.equal(got.view(6, 6, 32), (blocks * (1 / scales)[..., None]).round())
    negative, _ = codes_and_params("uint4[g32,f32]", -x)
    assert negative.count_nonzero() == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_other_rules(bits: int) -> None:
    x = torch.randn(SHAPE)
    blocks, (low, high) = x.view(6, 6, 32), bounds(bits, True)
    _, (narrow,) = codes_and_params(f"int{bits}[g32,f32,narrow]", x)
    assert torch.equal(narrow, blocks.abs().amax(-1) / high)
    codes, (signed,) = codes_and_params(f"int{bits}[g32,f32,signed]", x)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    assert torch.equal(signed, extreme / low)
    assert (codes.view(6, 6, 32).amin(-1) == low).all()  # the extreme itself has the lowest code
    _, (power,) = codes_and_params(f"int{bits}[g32,f32,pow2]", x)
    assert torch.equal(power, torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1) / high))))


@pytest.mark.parametrize(
    "text", ["int4[g32]", "int8", "uint4[g32,zero]", "uint8[tensor,zero]", "q4_0", "q4_1", "q8_0"]
)
@pytest.mark.parametrize(
    "more", ["uint4[3x64,zero:float]", "mxfp4[even]", "nvfp4", "float8_e4m3fn", "uint6[g32]"]
)
def test_a_range_gives_what_the_data_gives(text: str, more: str) -> None:
    for f in (format(text), format(more)):
        x = torch.randn(SHAPE)
        low, high = f._granularity.extremes(x)
        chosen, ranged = f.choose(x), f.from_range(low, high)
        assert len(chosen) == len(ranged)
        assert all(
            torch.equal(a.float(), b.float()) and a.dtype == b.dtype
            for a, b in zip(chosen, ranged, strict=True)
        )
        assert torch.equal(f.quantize(x, ranged).codes, f.quantize(x).codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "skewed", "outlier"])
def test_hqq(kind: str, bits: int) -> None:
    """Scales and zero points of the same iteration; the zero point is stored as tinygemm's, in other words as
    (8 - z) s where the public one keeps z, so it and the codes agree to float32 rounding, not to the bit."""
    x = INPUTS[kind]()
    want, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
        x, nbits=bits, group_size=32, compute_dtype=torch.float32, device="cpu"
    )
    f = format(f"uint{bits}[g32,f32,zero:float,hqq]")
    got, (scales, zeros) = codes_and_params(str(f), x)
    assert torch.equal(scales.flatten(), scale.flatten())
    # zero points are sums of a few terms of at most 2**bits scales: 4 roundings of those
    bound = 4 * 2**-23 * (1 << bits) * scales.flatten()
    assert ((zeros.flatten() - zero.flatten()).abs() <= bound + 4e-7 * zero.flatten().abs()).all()
    assert (got.reshape(want.shape) != want).float().mean() <= 2e-3
    if kind == "outlier":  # what it is for; on normal data of 4 bits it is slightly worse than min and max
        plain = format(f"uint{bits}[g32,f32,zero:float]")
        assert (f.fake_quantize(x) - x).abs().mean() <= (plain.fake_quantize(x) - x).abs().mean()
