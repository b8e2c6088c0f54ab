"""MX and NVFP4 blocks, bit for bit against torchao's mx_formats; where they part, OCP MX 1.0.

Departures, each with a test here: a block with an infinity (torchao 247 or 254, the spec's scale NaN), the
scale byte 0 (torchao decodes 2**-126, the spec 2**-127), and rceil through a float32 log2 that misses the
last bits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.formats import Format, format

mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
MODE = mx.ScaleCalculationMode

ELEMENTS = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": mx.DTYPE_FP6_E3M2,
    "mxfp6_e2m3": mx.DTYPE_FP6_E2M3,
    "mxfp4": torch.float4_e2m1fn_x2,
}
RULES = ["floor", "ceil", "even", "rceil"]


def spread_out() -> Tensor:
    """Blocks of all magnitudes that a float32 block scale can have without bytes 0 and 255, and zeros."""
    x = torch.randn(400, 32) * torch.logspace(-34, 36, 400)[:, None]
    edges = torch.tensor(
        [2.0, 1.9999999, 1.75, 1.5, 1.25, 6.0, 7.0, 7.5, 448.0, 480.0, 1.0000001, 31.0, 57344.0, 61440.0]
    )
    return torch.cat([x, edges[:, None].expand(-1, 32) * torch.linspace(-1, 1, 32)])


def unpacked(f: Format, x: Tensor) -> tuple[Tensor, Tensor]:
    q = f.quantize(x)
    return f.unpack(q.codes, q.k), q.scales


def oracle(name: str, rule: str, x: Tensor) -> tuple[Tensor, Tensor]:
    scale, data = mx.to_mx(x, ELEMENTS[name], 32, MODE[rule.upper()])
    if name == "mxfp4":
        data = mx.unpack_uint4(data)
    return data.view(torch.uint8), scale.view(torch.uint8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(name: str, rule: str, dtype: torch.dtype) -> None:
    x = spread_out().to(dtype)
    codes, scales = unpacked(format(f"{name}[{rule}]"), x)
    want_codes, want_scales = oracle(name, rule, x)
    usual = want_scales[:, 0] > 0
    assert usual.sum() > 380
    assert torch.equal(scales[usual], want_scales[usual])
    assert torch.equal(codes[usual], want_codes[usual])


@pytest.mark.parametrize("name", ELEMENTS)
def test_decoding(name: str) -> None:
    x = spread_out()
    f = format(name)
    q = f.quantize(x)
    data = q.codes if name == "mxfp4" else f.unpack(q.codes, 32)
    if f.element.bits == 8:
        data = data.view(ELEMENTS[name])
    for dtype in (torch.float32, torch.bfloat16):
        want = mx.to_dtype(data, q.scales.view(torch.float8_e8m0fnu), ELEMENTS[name], 32, dtype)
        assert torch.equal(f.dequantize(q, dtype), want)


def test_packing_of_four_bits_is_torchaos() -> None:
    x = torch.randn(8, 64)
    _, data = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, MODE.FLOOR)
    assert torch.equal(format("mxfp4").quantize(x).codes, data)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "mxint8"])
@pytest.mark.parametrize("rule", RULES)
def test_a_block_that_is_not_finite_is_nan_and_leaves_its_neighbours_alone(name: str, rule: str) -> None:
    f = format(f"{name}[{rule}]")
    x = torch.randn(1, 128)
    x[0, 5], x[0, 40], x[0, 70] = math.inf, math.nan, -math.inf
    q = f.quantize(x)
    assert q.scales.tolist()[0][:3] == [255, 255, 255]
    back = f.dequantize(q)
    assert back[0, :96].isnan().all() and back[0, 96:].isfinite().all()
    assert torch.equal(f.fake_quantize(x)[0, 96:], back[0, 96:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*ELEMENTS, "mxint8"])
def test_zeros_and_the_smallest_scale(name: str, rule: str) -> None:
    f = format(f"{name}[{rule}]")
    zero = f.quantize(torch.zeros(2, 64))
    assert zero.scales.count_nonzero() == 0 and f.dequantize(zero).count_nonzero() == 0
    # Byte 0 is 2**-127 (OCP MX 5.4.1): the value 1 under it decodes to that, not to 2**-126.
    one = f.element.encode(torch.tensor([1.0]))
    parts = [f.pack(one.expand(1, 32).contiguous()), torch.zeros(1, 1, dtype=torch.uint8)]
    from bitfold.formats import Quantized

    assert f.dequantize(Quantized.from_parts(f, parts, 32))[0, 0].item() == 2.0**-127
    # and a block that needs it gets values within half a step (the step of 1.0 .. 2.0) of the truth
    x = torch.full((1, 32), 1.5 * 2.0**-127)
    step = 2.0**-127 * 2.0 ** -(f.element.mantissa or 0)
    assert (f.fake_quantize(x) - x).abs().max().item() <= step


def test_rceil_is_exact_where_a_float32_logarithm_is_not() -> None:
    """The conversion instruction rounds the exact quotient up; log2 of 2**k (1 + 2**-23) is k in float32."""
    f = format("mxfp8[rceil]")
    amax = np.nextafter(np.float32(448 * 8), np.float32(np.inf))
    scale = f.quantize(torch.full((1, 32), float(amax))).scales.item()
    assert scale == 127 + 4
    assert f.quantize(torch.full((1, 32), 448.0 * 8)).scales.item() == 127 + 3


@pytest.mark.parametrize("rule", RULES)
def test_scale_exponents_against_exact_arithmetic(rule: str) -> None:
    """The definitions of numerics, in exact integers: frexp gives the exponent without rounding."""
    rng = np.random.default_rng(3)
    amax = np.ldexp(rng.uniform(1, 2, 3000), rng.integers(-110, 110, 3000)).astype(np.float32)
    for name in [*ELEMENTS, "mxint8"]:
        e = format(name).element
        got = format(f"{name}[{rule}]").from_range(torch.from_numpy(-amax), torch.from_numpy(amax))[0].numpy()
        mantissa, exponent = np.frexp(
            amax.astype(np.float64)
        )  # amax = mantissa * 2**exponent, 0.5 <= mantissa < 1
        if rule == "rceil":
            quotient, power = np.frexp((amax / np.float32(e.reach)).astype(np.float64))
            want = power - (quotient == 0.5)
        else:
            if rule == "even":
                kept = 2.0 ** ((e.mantissa or 0) + 1)
                mantissa, more = np.frexp(np.floor(mantissa * kept + 0.5) / kept)
                exponent = exponent + more
            want = exponent - 1 - e.emax + ((mantissa > 0.5) if rule == "ceil" else 0)
        np.testing.assert_array_equal(got, np.clip(want, -127, 127) + 127)


def test_mxint8_is_the_fixed_point_of_the_specification() -> None:
    f = format("mxint8")
    assert (f.element.low, f.element.high, f.element.emax) == (-2.0, 127 / 64, 0)
    x = torch.linspace(-1.99, 1.98, 32)[None]
    q = f.quantize(x)
    assert q.scales.item() == 127
    assert torch.equal(q.codes.view(torch.int8).float(), (x * 64).round().clamp(-128, 127))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_two_levels(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    x[3] = 0
    f = format("nvfp4")
    q = f.quantize(x)
    tensor_scale = nv.per_tensor_amax_to_scale(x.abs().max())
    assert torch.equal(q.tensor_scale.flatten(), tensor_scale.flatten())
    scale, data = nv.nvfp4_quantize(x, 16, tensor_scale)
    assert torch.equal(q.scales.view(torch.uint8).flatten(), scale.view(torch.uint8).flatten())
    assert torch.equal(q.codes, data)
    total = tensor_scale * scale.float()
    want = mx.f4_unpacked_to_f32(mx.unpack_uint4(data)).view(64, 16, 16) * total.view(64, 16, 1)
    assert torch.equal(f.dequantize(q), want.view(64, 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_one_level(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 256) * torch.logspace(-3, 2, 64)[:, None]).to(dtype)
    x[3] = 0
    scale, data = nv.nvfp4_quantize(x, 16)
    q = format("nvfp4[one_level]").quantize(x)
    assert torch.equal(q.scales.view(torch.uint8).flatten(), scale.view(torch.uint8).flatten())
    assert torch.equal(q.codes, data)


def test_nvfp4_of_zeros_and_of_infinity() -> None:
    f = format("nvfp4")
    q = f.quantize(torch.zeros(2, 32))
    assert q.tensor_scale.item() == 0 and f.dequantize(q).count_nonzero() == 0
    x = torch.randn(2, 32)
    x[0, 0] = math.inf
    assert f.dequantize(f.quantize(x)).isnan().any()
