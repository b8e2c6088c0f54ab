"""The kernels that round in training, on a card: the reference's bits and gradients; a compiled step."""

from __future__ import annotations

import copy

import pytest
import torch
from ewgs_estimator import Ewgs
from torch import nn

import bitfold as bf
from bitfold.formats import estimators, format
from bitfold.formats.gradient import Gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
FORMATS = ["int4[g32]", "int8", "uint4[g32,zero]", "mxfp4", "float8_e4m3fn", "int2[g32]"]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "_registered", {})
    estimators.register(Ewgs())


@pytest.mark.parametrize("kind", ["straight", "clip", "lsq", "pact", "ewgs:0.5"])
@pytest.mark.parametrize("text", FORMATS)
def test_on_a_card_it_is_the_reference(added: None, text: str, kind: str) -> None:
    torch.manual_seed(0)
    fmt, how = format(text), Gradient.parse(kind)
    if kind == "pact" and fmt.scale.zero != "none":
        pytest.skip("pact has no zero points")
    start = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16)
    flow = torch.randn_like(start)
    found = []
    for flag in ("+fused", "+kernel"):
        x = start.clone().requires_grad_()
        held = []
        if how.learns:
            held = [(part * 0.7).requires_grad_() for part in how.estimator.start(fmt, fmt.choose(start))]
        y = torch.ops.bitfold.train_quantize(x, text, kind + flag, held, True)
        y.backward(flow)
        found.append([y, x.grad, *(part.grad for part in held)])
    (y, for_x, *sums), (other_y, other_x, *other_sums) = found
    assert torch.equal(y, other_y) and torch.equal(for_x, other_x)
    for one, other in zip(sums, other_sums, strict=True):
        # Sums of up to 4096 float32 terms below 64 in another order, times a factor below 1.
        assert torch.allclose(one, other, rtol=1e-3, atol=4096 * 2**-24 * 64)


@pytest.mark.parametrize("gradient", ["straight", "lsq"])
def test_a_compiled_step_with_kernels_is_the_one_without(gradient: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().bfloat16()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    found = []
    for flag in ("+fused", "+kernel"):
        torch._dynamo.reset()
        one = bf.prepare_qat(copy.deepcopy(model), "int4[g32]", bf.Qat(gradient + flag))
        torch.compile(one, fullgraph=True)(x).float().square().mean().backward()
        found.append([parameter.grad.float() for parameter in one.parameters()])
    for ours, theirs in zip(*found, strict=True):
        # bfloat16 gradients through two layers, each rounded to 8 bits of mantissa.
        assert (ours - theirs).norm() <= 0.02 * theirs.norm() + 1e-8


@pytest.mark.parametrize(
    "text", [*FORMATS, "int8[noclip]", "int4[g32,signed]", "uint8[g64,f16,zero:min]", "nvfp4", "mxfp8[rceil]"]
)
def test_codes_made_on_a_card_are_those_of_a_processor(text: str) -> None:
    torch.manual_seed(0)
    fmt, x = format(text), torch.randn(256, 512)
    here, there = fmt.quantize(x), fmt.quantize(x.cuda())
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(fmt.dequantize(here), fmt.dequantize(there).cpu())
