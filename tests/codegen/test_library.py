"""Products by torch's library: which specs have one, and that it computes what a kernel would.

linear 96x64 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn   ->   _scaled_mm on the codes
"""

from __future__ import annotations

import pytest
import torch

from bitfold.codegen import CodegenError, GemmSpec, choose
from bitfold.codegen.library import has_library, multiplies_codes, product
from bitfold.codegen.pipelined import Pipelined
from bitfold.codegen.schedule import Schedule
from bitfold.codegen.trial import reference
from bitfold.lowering.fused import fused

CODES = "linear 96x64 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn"
# Sums are float32 and rounded to bfloat16 once: 2**-9 of each number at most.
BOUND = 2.0**-9


def case(text: str, m: int) -> tuple[GemmSpec, list[torch.Tensor], torch.Tensor]:
    """(spec, the inputs of a call, what it must give in float32)."""
    spec = GemmSpec.parse(text)
    assert spec.activation is not None
    x = spec.activation.quantize(torch.randn(m, spec.k))
    weight = spec.weight.quantize(torch.randn(spec.n, spec.k) * 0.05)
    biases = [torch.randn(spec.n).bfloat16()] * spec.bias
    inputs = [*x.parts, *weight.parts, *biases]
    decoded = spec.weight.dequantize(weight).float()
    return spec, inputs, reference(spec, inputs, spec.activation.dequantize(x).float(), [decoded])


@pytest.mark.parametrize(
    ("text", "by_codes", "any"),
    [
        (CODES, True, True),
        (CODES + " bias", True, True),
        ("linear 96x64 bf16 float8_e4m3fn[tensor,bytes] x:float8_e4m3fn[tensor]", True, True),
        ("linear 96x64 bf16 int4[g32,halves128]", False, True),
        ("linear 96x64 f16 float8_e4m3fn[bytes] x:float8_e4m3fn", False, False),
        ("linear 95x64 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn", False, False),
        ("linear 96x64 bf16 int8[bytes] x:int8", False, False),
        ("linear 128x256 bf16 float8_e4m3fn[128x128,bytes] x:float8_e4m3fn[g128]", False, False),
        ("linear 128x256 bf16 int4[g128,planar256] x:float8_e4m3fn", False, False),
        ("grouped 4 96x64 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn", False, False),
        ("grouped 4 96x64 bf16 int4[g32,halves128]", False, False),
    ],
)
def test_which_specs_have_one(text: str, by_codes: bool, any: bool) -> None:
    spec = GemmSpec.parse(text)
    assert multiplies_codes(spec) == by_codes
    assert has_library(spec) == any


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize(
    "text",
    [
        CODES,
        CODES + " bias",
        "linear 96x64 bf16 float8_e4m3fn[tensor,bytes] x:float8_e4m3fn[tensor]",
        "linear 96x64 bf16 float8_e4m3fn[bf16,bytes] x:float8_e4m3fn[tensor]",
    ],
)
def test_a_product_of_codes_is_that_of_their_values(text: str, m: int) -> None:
    spec, inputs, wanted = case(text, m)
    given = spec.inputs(inputs)
    y = product(spec, given.x, given.x_scales, given.parts[0], given.biases[0] if spec.bias else None)
    assert y.shape == (m, 96) and y.dtype == torch.bfloat16
    assert float((y.float() - wanted).norm() / wanted.norm()) <= BOUND
    assert product(spec, given.x[:0], given.x_scales, given.parts[0]).shape == (0, 96)


def test_what_has_none_is_refused() -> None:
    spec, inputs, _ = case("linear 96x64 bf16 int8[bytes] x:int8", 3)
    given = spec.inputs(inputs)
    with pytest.raises(CodegenError, match="no product of the library does what"):
        product(spec, given.x, given.x_scales, given.parts[0])


def test_between_sixteen_and_32_rows_codes_are_the_librarys() -> None:
    """Where nothing was measured, and tiles of ours would leave most of the card idle."""
    spec = GemmSpec.parse(CODES)
    assert choose(spec, 16) is not None and choose(spec, 17) is None
    assert isinstance(choose(spec, 33), Pipelined)


def test_the_operator_takes_it() -> None:
    """With what stands around x: more dimensions, and scales for each of its rows."""
    _, (codes, scales, *parts), wanted = case(CODES, 20)
    (y,) = fused([codes.reshape(2, 10, 64), scales.reshape(2, 10, 1), *parts], CODES)
    assert y.shape == (2, 10, 96)
    assert float((y.float().flatten(0, 1) - wanted).norm() / wanted.norm()) <= BOUND


def test_where_our_tiles_fill_the_card_they_are_faster() -> None:
    wide = GemmSpec.parse("linear 20480x4096 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn")
    assert isinstance(choose(wide, 64), Schedule)
    assert isinstance(choose(wide, 256), Pipelined) and isinstance(choose(wide, 4096), Pipelined)
