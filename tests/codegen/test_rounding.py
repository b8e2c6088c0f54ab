"""The kernels that round in training, through Triton's interpreter: the reference's bits and gradients."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from ewgs_estimator import Ewgs
from test_cache_write import hard_rows

from bitfold.codegen.lanes import LANE_TYPES
from bitfold.codegen.rounding import RoundingSpec, rounding_spec
from bitfold.codegen.spec import CodegenError
from bitfold.formats import estimators, format, learned
from bitfold.formats.gradient import Gradient
from bitfold.formats.train_quantize import backward

FORMATS = [
    "int8[bf16]", "int4[g32]", "int2[g32]", "int3[g32,f16]", "int4[g32,e8m0]", "uint4[g32,zero]",
    "uint8[zero]", "int8[g16,narrow]", "mxfp4", "mxfp8[even]", "mxfp6_e3m2[ceil]", "float8_e4m3fn[bf16]",
    "float8_e5m2[f16]", "float8_e4m3fnuz", "float4_e2m1[g16]",
]  # fmt: skip
LANES = {**LANE_TYPES, "f32": torch.float32}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


@pytest.mark.parametrize("lane", ["bf16", "f32"])
@pytest.mark.parametrize("text", FORMATS)
def test_rounded_numbers_are_the_formats(interpret: Any, text: str, lane: str) -> None:
    fmt, x = format(text), hard_rows(96, LANES[lane])
    spec = rounding_spec(fmt, lane, 96, "forward", False)
    (made,) = interpret(what="rounding", spec=spec, x=x, scales=[])["made"]
    assert same(made, fmt.fake_quantize(x))
    scales = [
        part * 1.5 if part.is_floating_point() and i == 0 else part for i, part in enumerate(fmt.choose(x))
    ]
    given = rounding_spec(fmt, lane, 96, "forward", True)
    (made,) = interpret(what="rounding", spec=given, x=x, scales=scales)["made"]
    assert same(made, fmt.fake_quantize(x, scales))


@pytest.mark.parametrize("kind", ["clip", "lsq", "pact"])
@pytest.mark.parametrize("text", FORMATS)
def test_gradients_are_the_references(interpret: Any, text: str, kind: str) -> None:
    fmt, how = format(text), Gradient(kind)
    if kind == "pact" and fmt.scale.zero != "none":
        pytest.skip("pact has no zero points")
    x = hard_rows(96, torch.bfloat16)[:21]  # the last two hold infinity and NaN
    shrunk = fmt.choose(x * 0.3)  # so that some numbers lie outside
    torch.manual_seed(0)
    gradient = torch.randn_like(x)
    held = [part.float() for part in learned.learned(fmt, shrunk)] if how.learns else []
    wanted_x, wanted = backward(fmt, how, gradient, x, shrunk, held)
    spec = rounding_spec(fmt, "bf16", 96, kind, True)
    made = interpret(what="rounding", spec=spec, x=x, scales=list(shrunk), gradient=gradient)["made"]
    assert same(made[0], wanted_x)
    assert 0 < (made[0] == 0).float().mean() < 1
    count = 96 // spec.group
    # arXiv 1902.08153, section 2.2: 1 / sqrt(N Qp), of N numbers a step; the others have none.
    factor = (max(fmt.element.high, 1.0) * spec.group) ** -0.5 if kind == "lsq" else 1.0
    for ours, theirs in zip(made[1:], wanted, strict=False):
        # A sum of `group` terms of float32 in another order, each below the largest: group * 2**-24 of it.
        scale = gradient.float().abs().max() * 32 * max(abs(fmt.element.high), 1)
        assert torch.allclose(
            ours.reshape(-1, count) * factor,
            theirs.reshape(-1, count),
            rtol=1e-4,
            atol=float(scale) * 96 * 2**-24,
        )


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Ewgs:
    monkeypatch.setattr(estimators, "_registered", {})
    monkeypatch.setattr(estimators.cache_tag, "add", lambda text: None)
    estimators.register(Ewgs())
    return Ewgs()


@pytest.mark.parametrize("text", ["int4[g32]", "uint4[g32,zero]", "mxfp4"])
def test_lines_that_a_user_adds_are_a_kernel(interpret: Any, added: Ewgs, text: str) -> None:
    fmt, x = format(text), hard_rows(96, torch.bfloat16)[:21]
    scales = fmt.choose(x * 0.3)
    gradient = torch.randn_like(x)
    wanted, _ = backward(fmt, Gradient("ewgs", 0.5), gradient, x, scales, [])
    spec = rounding_spec(fmt, "bf16", 96, "ewgs:0.5", True)
    found = interpret(what="rounding", spec=spec, x=x, scales=list(scales), gradient=gradient, added=added)
    assert same(found["made"][0], wanted) and not same(wanted, gradient)


def test_the_notes_show_what_is_tested_here() -> None:
    notes = (Path(__file__).parents[2] / "docs" / "notes" / "qat.md").read_text(encoding="utf-8")
    assert inspect.getsource(Ewgs) in notes


def test_lines_that_a_user_adds_compile(added: Ewgs) -> None:
    pytest.importorskip("triton")
    from bitfold.codegen.triton.rounding_build import inspect_rounding

    made = inspect_rounding(rounding_spec(format("int4[g32]"), "bf16", 4096, "ewgs", True), 90)
    assert made.spills == 0 and "fma.rn.f32" not in made.ptx


def test_what_has_no_kernel_says_why() -> None:
    for text, why in (
        ("nvfp4", "scales"), ("int8[tensor]", "row of memory"), ("nf4[g32]", "looked up"),
        ("uint8", "zero point"), ("float8_e4m3fn[unscaled]", "no scale"),
    ):  # fmt: skip
        with pytest.raises(CodegenError, match=why):
            rounding_spec(format(text), "bf16", 96, "forward", False)
    for direction, why in (
        ("smooth:5", "the gradient smooth:5 has no lines"), ("straight", "no lines"),
        ("lsq+item", "without flags, lsq"), ("lsqq", "not 'lsqq'"),
    ):  # fmt: skip
        with pytest.raises(CodegenError, match=why):
            rounding_spec(format("int4[g32]"), "bf16", 96, direction, True)
    with pytest.raises(CodegenError, match="do not divide"):
        rounding_spec(format("int4[g64]"), "bf16", 96, "forward", False)
    with pytest.raises(CodegenError, match="a program holds"):
        RoundingSpec("int8", "bf16", 1 << 20)


@pytest.mark.parametrize(
    "text,direction", [("int4[g32]", "forward"), ("uint4[g32,zero]", "lsq"), ("mxfp4", "clip")]
)
def test_as_compiled(text: str, direction: str) -> None:
    pytest.importorskip("triton")
    from bitfold.codegen.triton.rounding_build import inspect_rounding

    made = inspect_rounding(rounding_spec(format(text), "bf16", 4096, direction, direction != "forward"), 90)
    assert made.spills == 0
    assert "fma.rn.f32" not in made.ptx, "a product fused into a sum rounds once"
    assert "ld.global.v4" in made.ptx or "ld.global.v2" in made.ptx, "numbers are read several at a time"
