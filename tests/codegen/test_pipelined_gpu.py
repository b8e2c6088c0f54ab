"""On a GPU of compute capability 9.0: pipelined kernels against float64, the same answer twice, flags as
before.

    linear 4104x4096 bf16 int4[g128,halves256], "tma m64 n128 g2 w4 x3 j2 c3 p1 lane streamk", M = 100
"""

from __future__ import annotations

import pytest
import torch

from bitfold.codegen import GemmSpec, kernel_layout
from bitfold.codegen.pipelined import Pipelined, modes
from bitfold.formats import format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]

PLANS = [
    ("m256 n128 g1 w8 x3 j1 c2 p1", 300),
    ("m128 n128 g2 w4 x4 j1 c2 p1", 1000),
    ("m64 n128 g2 w4 x3 j2 c2 p1", 64),
    ("m32 n128 g1 w8 x3 j1 c2 p2", 63),
    ("m32 n64 g1 w4 x3 j2 c2 p2", 33),
    ("m16 n64 g1 w4 x4 j2 c2 p1", 1),
]
FORMATS = [
    "int4[g128]", "int8", "int3[g128]", "mxfp4", "nvfp4", "uint4[g64,zero]", "nf4[g64]", "float8_e4m3fn",
    "int5[g64]", "int2[g128,f32]",
]  # fmt: skip


PLANS_OF_BYTES = [
    ("m128 n128 g2 w4 x4 j1 c4 p1", 300), ("m128 n128 g1 w8 x4 j1 c4 p1", 1000),
    ("m64 n128 g2 w4 x4 j1 c4 p1", 64), ("m128 n256 g2 w4 x4 j1 c3 p1", 700),
    ("m64 n64 g1 w4 x4 j1 c4 p2", 33),
]  # fmt: skip
PAIRS = [
    ("float8_e4m3fn[row]", "float8_e4m3fn[row]"), ("float8_e4m3fn[128x128]", "float8_e4m3fn[g128]"),
    ("int8[row]", "int8[row]"), ("int4[g128]", "float8_e4m3fn[row]"), ("int4[g128]", "int8[row]"),
    ("int4[g32]", "int8"), ("mxfp4", "float8_e4m3fn[g128]"), ("int8[g64,f32]", "int8[row]"),
]  # fmt: skip


@pytest.mark.parametrize("streamk", ["", " streamk"])
@pytest.mark.parametrize(("weight_text", "x_text"), PAIRS)
def test_values_of_bytes(weight_text: str, x_text: str, streamk: str) -> None:
    """Activations in codes; int32 sums to the bit, but for the scaling and the rounding of the result."""
    from bitfold.codegen.triton.pipelined_build import launch

    activation = format(x_text).with_layout("bytes")
    for n, k in ((4224 if "128x" in weight_text else 4104, 4096), (28672, 512)):
        layout = kernel_layout(format(weight_text), k, activation)
        assert layout is not None
        spec = GemmSpec(layout, n, k, activation=activation)
        q = spec.weight.quantize(torch.randn(n, k, device="cuda") * 0.05)
        weight = spec.weight.dequantize(q).double()
        ran = 0
        for plan, m in PLANS_OF_BYTES:
            schedule = Pipelined.parse(f"tma {plan} {modes(spec)[0]}{streamk}")
            if schedule.obstacle(spec) is not None:
                continue
            of_x = activation.quantize(torch.randn(m, k, device="cuda"))
            want = activation.dequantize(of_x).double() @ weight.T
            runs = []
            for _ in range(3):
                y = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
                launch(spec, schedule, of_x.codes, q.parts, x_scales=of_x.scales, out=y)
                runs.append(y.clone())
            error = ((runs[0].double() - want).norm() / want.norm()).item()
            assert error < 2**-8, (plan, n, k)
            assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
            ran += 1
        assert ran or streamk


@pytest.mark.parametrize("streamk", ["", " streamk"])
@pytest.mark.parametrize("text", FORMATS)
def test_values(text: str, streamk: str) -> None:
    from bitfold.codegen.triton.pipelined_build import launch, workspace

    count = torch.cuda.get_device_properties(0).multi_processor_count
    for i, (n, k) in enumerate(((4104, 4096), (1000, 1152), (28672, 512))):
        layout = kernel_layout(format(text), k)
        assert layout is not None
        spec = GemmSpec(layout, n, k, bias=i == 1)
        q = spec.weight.quantize(torch.randn(n, k, device="cuda") * 0.05)
        weight = spec.weight.dequantize(q).double()
        bias = torch.randn(n, device="cuda").bfloat16() if spec.bias else None
        for plan, m in PLANS:
            schedule = Pipelined.parse(f"tma {plan} {modes(spec)[0]}{streamk}")
            if schedule.obstacle(spec) is not None:
                continue
            x = torch.randn(m, k, device="cuda").bfloat16()
            room = workspace(spec, schedule, count, x)
            room[0].fill_(float("nan"))
            runs = []
            for _ in range(3):
                y = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
                runs.append(launch(spec, schedule, x, q.parts, bias, out=y, room=room).clone())
                assert not room[1].any()
            want = x.double() @ weight.T + (0 if bias is None else bias.double())
            error = ((runs[0].double() - want).norm() / want.norm()).item()
            assert error < 2**-8, (plan, n, k)
            assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
