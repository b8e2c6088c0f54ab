"""Values of kernels that do more than multiply by one weight, through Triton's interpreter, against float64.

    linear 33x96 bf16 2*int4[g32,halves128] -> mul(silu(y0),y1), "m8 n32 w4 s3 k2 sum", M = 5   ->   y

Several weights, epilogues, activations that come in 8-bit codes, experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfold.codegen import CodegenError, GemmSpec, Schedule, Walk, kernel_layout, scales
from bitfold.codegen.epilogue import OPS, Apply, Epilogue
from bitfold.formats import Quantized, format

Interpret = Callable[..., dict[str, Any]]
U = 2.0**-24


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid(text: str, k: int, activation: str | None = None) -> str:
    found = kernel_layout(format(text), k, None if activation is None else format(activation))
    assert found is not None
    return str(found)


def operands(spec: GemmSpec, m: int, seed: int) -> list[Tensor]:
    """Inputs of a kernel, in their order. Weights differ from row to row, and from expert to expert."""
    x = drawn(m, spec.k, seed=seed)
    if spec.activation is None:
        found = [x.to(spec.dtype)]
    else:
        found = list(spec.activation.quantize(x * (1 + torch.arange(m) % 3)[:, None]).parts)
    if spec.experts:
        cut = torch.randint(0, m + 1, (spec.experts - 1,), generator=torch.Generator().manual_seed(seed))
        found.append(torch.cat([cut.sort().values, torch.tensor([m])]).to(torch.int32))
    for which in range(spec.weights):
        shape = (spec.experts, spec.n, spec.k) if spec.experts else (spec.n, spec.k)
        found += spec.weight.quantize(drawn(*shape, seed=seed + 10 + which) * 0.1).parts
    found += [drawn(spec.n, seed=seed + 20 + i, dtype=spec.dtype) for i in range(spec.weights * spec.bias)]
    found += [drawn(m, spec.n, seed=seed + 30 + i, dtype=spec.dtype) for i in range(spec.epilogue.count("e"))]
    return found + [
        drawn(spec.n, seed=seed + 40 + i, dtype=spec.dtype) for i in range(spec.epilogue.count("v"))
    ]


def exact_mode(spec: GemmSpec, which: int = 0) -> str:
    """A place for the scale that rounds no weight; those that do are for `test_values.py`."""
    modes = [mode for mode in scales(spec) if mode in ("sum", "end")]
    return modes[which % len(modes)]


def sums(spec: GemmSpec, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(exact sums [M, n], their bounds) of each weight, in float64. A bound is what K products and their
    scaling may lose in float32: (2 K + 32) u sum |x| |w|, with |w| and an offset's parts taken apart."""
    given = spec.inputs(inputs)
    x = given.x.double()
    if spec.activation is not None:
        assert given.x_scales is not None
        x = Quantized.from_parts(spec.activation, [given.x, given.x_scales], spec.k).dequantize(torch.float64)
    exact, bounds = [], []
    for which, parts in enumerate(given.parts):
        q = Quantized.from_parts(spec.weight, parts, spec.k)
        w = q.dequantize(torch.float64)
        # Offsets and codes cancel: at most the largest code under the largest scale, twice.
        apart = w.abs()
        if q.zeros is not None or spec.lane == "int8":
            element = spec.weight.element
            apart = apart + 2 * (element.high - element.low) * _largest(q)
        if spec.experts:
            assert given.ends is not None
            y, b = torch.zeros(x.shape[0], spec.n).double(), torch.zeros(x.shape[0], spec.n).double()
            start = 0
            for expert, end in enumerate(given.ends.tolist()):
                y[start:end] = x[start:end] @ w[expert].T
                b[start:end] = x[start:end].abs() @ apart[expert].T
                start = end
        else:
            y, b = x @ w.T, x.abs() @ apart.T
        b = (2 * spec.k + 32) * U * b
        if spec.bias:
            y = y + given.biases[which].double()
            b = b + 4 * U * (y.abs() + given.biases[which].double().abs())
        exact.append(y)
        bounds.append(b)
    return exact, bounds


def _largest(q: Quantized) -> Tensor:
    if q.scales is None or q.format.scale is None:
        return torch.ones(())
    return q.format.scale.decode(q.scales).double().abs().max().expand(q.shape)


def spread(epilogue: Epilogue, given: dict[str, Tensor], bounds: dict[str, Tensor]) -> Tensor:
    """How far a result may move when each sum moves by its bound: the derivative, doubled for what is not
    linear, times the bound; and 16 roundings in float32 of the largest number on the way."""
    leaves = {name: value.clone().requires_grad_(name in bounds) for name, value in given.items()}
    y = _double(epilogue.root, leaves)
    wanted = sorted(bounds)
    slopes = torch.autograd.grad(y.sum(), [leaves[name] for name in wanted])
    moved = sum((2 * s.abs() + 1e-3) * bounds[name] for name, s in zip(wanted, slopes, strict=True))
    on_the_way = torch.stack([v.abs() for v in _values(epilogue.root, given)]).amax(0)
    assert isinstance(moved, Tensor)
    return moved + 16 * U * on_the_way


def _double(of: Any, given: dict[str, Tensor]) -> Any:
    if isinstance(of, Apply):
        return OPS[of.op].run(*(_double(operand, given) for operand in of.operands))
    return given[of] if isinstance(of, str) else of


def _values(of: Any, given: dict[str, Tensor]) -> list[Tensor]:
    inner = [v for operand in of.operands for v in _values(operand, given)] if isinstance(of, Apply) else []
    here = _double(of, given)
    return [*inner, here.expand(given["y0"].shape)] if isinstance(here, Tensor) else inner


def check(interpret: Interpret, spec: GemmSpec, schedule: Schedule, m: int, seed: int = 0) -> None:
    assert schedule.obstacle(spec) is None
    assert GemmSpec.parse(str(spec)) == spec
    inputs = operands(spec, m, seed)
    told = interpret(spec=spec, schedule=schedule, inputs=inputs)
    y = told["y"]
    exact, bounds = sums(spec, inputs)
    extras = spec.inputs(inputs).extras
    named = {f"y{i}": value for i, value in enumerate(exact)}
    matrices = spec.epilogue.count("e")
    named |= {f"e{i}": value.double() for i, value in enumerate(extras[:matrices])}
    named |= {f"v{i}": value.double().expand(m, spec.n) for i, value in enumerate(extras[matrices:])}
    of_sums = {f"y{i}": value for i, value in enumerate(bounds) if f"y{i}" in spec.epilogue.names}
    want = _double(spec.epilogue.root, named)
    bound = spread(spec.epilogue, named, of_sums)
    # The interpreter truncates to bfloat16 where a GPU rounds: a whole ulp.
    r = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11, torch.float32: 0.0}[spec.out]
    bound = bound + r * (want.abs() + bound) + (2.0**-24 if spec.out == torch.float16 else 0.0)
    assert y.dtype == spec.out and y.shape == (m, spec.n)
    error = (y.double() - want).abs()
    where = f"{spec} | {schedule} | M={m}"
    assert (error <= bound).all(), f"{where}: off by {(error / bound).nan_to_num(0).max():.3g} tolerances"
    assert torch.equal(y, told["again"]), f"{where}: another answer in the second run"
    assert (told["locks"] == 0).all() and told["guarded"], where


# --- several weights and epilogues ------------------------------------------------------------------------

EPILOGUES = [
    ("y0", 1),
    ("mul(silu(y0),y1)", 2),
    ("add(y0,e0)", 1),
    ("add(mul(gelu_tanh(y0),v0),e0)", 1),
    ("f32(tanh(y0))", 1),
    ("clamp(sub(sigmoid(y0),v0),-0.5,0.25)", 1),
    ("div(hardswish(y0),add(relu(y1),1.5))", 2),
    ("mul(gelu(y0),leaky_relu(y1,0.1))", 2),
    ("add(neg(y2),mul(y1,y0))", 3),
]


@pytest.mark.parametrize(("text", "weights"), EPILOGUES, ids=[pair[0] for pair in EPILOGUES])
def test_epilogues(interpret: Interpret, text: str, weights: int) -> None:
    formats = itertools.cycle(["int4[g32]", "int8", "uint4[g32,zero]", "nvfp4"])
    for i, (bias, split, x) in enumerate([(False, 1, "bf16"), (True, 2, "f16"), (weights < 3, 3, "bf16")]):
        weight = format(laid(next(formats), 160))
        spec = GemmSpec(weight, 33, 160, x, bias, weights=weights, epilogue=Epilogue.parse(text))
        walked = spec.walk
        assert isinstance(walked, Walk)
        schedule = Schedule(8, 32, split=min(split, walked.runs), scale=exact_mode(spec))
        check(interpret, spec, schedule, m=5, seed=i)


# --- activations in codes ---------------------------------------------------------------------------------

PAIRS = [
    ("int8", "int8"),
    ("int8[tensor]", "int8[tensor]"),
    ("uint8[zero]", "int8"),
    ("int4[g32]", "int8"),
    ("int4", "int8"),
    ("uint4[g64,zero]", "int8"),
    ("uint4[zero:float]", "int8[tensor]"),
    ("uint2[g32,f16,zero:min]", "int8"),
    ("int3[g64]", "int8"),
    ("int6[unscaled]", "int8"),
    ("int8[32x32]", "int8[g32]"),
    ("int8f6[g32,e8m0]", "int8"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("float8_e4m3fn[32x32]", "float8_e4m3fn[g32]"),
    ("float8_e4m3fn[tensor]", "float8_e4m3fn[tensor]"),
    ("int4[g32]", "float8_e4m3fn"),
    ("int4", "float8_e4m3fn[g32]"),
    ("uint4[g32,zero]", "float8_e4m3fn"),
    ("mxfp4", "float8_e4m3fn"),
    ("mxfp6_e3m2", "float8_e4m3fn[g64]"),
    ("mxfp8", "mxfp8"),
]


@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=["x".join(pair) for pair in PAIRS])
def test_activations_in_codes(interpret: Interpret, weight: str, activation: str) -> None:
    k, n = 192, 32
    laid_out = format(laid(weight, k, activation))
    plain = GemmSpec(laid_out, n, k, activation=format(activation))
    found = plain.walk
    assert isinstance(found, Walk), found
    for i, scale in enumerate(scales(plain)):
        for split in {1, min(2, found.runs)}:
            epilogue = Epilogue.parse("add(y0,e0)") if split == 2 else Epilogue()
            spec = GemmSpec(
                laid_out, n, k, "f16" if i else "bf16", split == 1, format(activation), epilogue=epilogue
            )
            check(interpret, spec, Schedule(16, 32, split=split, scale=scale), m=5, seed=i)


def test_sums_of_integers_are_exact(interpret: Interpret) -> None:
    """int8 x int8 adds up in int32, split or not: the same bits, as a sum in float32 would not give."""
    k = 4096
    spec = GemmSpec(
        format("int8[bytes]"), 16, k, activation=format("int8"), epilogue=Epilogue.parse("f32(y0)")
    )
    x = torch.full((2, k), 127, dtype=torch.int8)
    x[1, ::2] = -128
    w = torch.full((16, k), 127, dtype=torch.int8)
    w[1::2, 1::3] = -127
    inputs = [
        x.view(torch.uint8),
        torch.ones(2, 1),
        w.view(torch.uint8),
        *spec.weight.quantize(drawn(16, k, seed=0)).parts[1:],
    ]
    inputs[3] = torch.ones_like(inputs[3])
    want = (x.long() @ w.long().T).float()
    for split in (1, 3):
        told = interpret(spec=spec, schedule=Schedule(16, 16, split=split, scale="end"), inputs=inputs)
        assert torch.equal(told["y"], want)


# --- experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_experts(interpret: Interpret, experts: int, m: int) -> None:
    for i, (text, activation) in enumerate([("int4[g32]", None), ("mxfp4", None), ("int8", "int8")]):
        weight = format(laid(text, 128, activation))
        spec = GemmSpec(weight, 33, 128, activation=activation and format(activation), experts=experts)
        split = 2 if i == 0 and spec.walk.runs > 1 else 1
        check(
            interpret,
            spec,
            Schedule(16 if activation else 8, 32, split=split, scale=exact_mode(spec)),
            m,
            seed=i + m,
        )


def test_two_weights_of_each_expert(interpret: Interpret) -> None:
    weight = format(laid("int4[g32]", 128))
    epilogue = Epilogue.parse("mul(silu(y0),y1)")
    spec = GemmSpec(weight, 64, 128, weights=2, experts=4, epilogue=epilogue)
    check(interpret, spec, Schedule(8, 64, scale="sum"), m=11)


# --- anything ---------------------------------------------------------------------------------------------


@given(
    weight=st.sampled_from(["int4[g32]", "int8", "uint4[g32,zero]", "mxfp4", "nvfp4", "float8_e4m3fn"]),
    epilogue=st.sampled_from([pair for pair in EPILOGUES if pair[1] < 3]),
    m=st.integers(0, 20),
    n=st.integers(1, 40),
    groups=st.integers(1, 5),
    split=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_any_epilogue_and_shape(
    interpret: Interpret,
    weight: str,
    epilogue: tuple[str, int],
    m: int,
    n: int,
    groups: int,
    split: int,
    bias: bool,
    seed: int,
) -> None:
    k = 64 * groups
    text, weights = epilogue
    spec = GemmSpec(format(laid(weight, k)), n, k, bias=bias, weights=weights, epilogue=Epilogue.parse(text))
    walked = spec.walk
    assert isinstance(walked, Walk)
    schedule = Schedule(8, 32, split=min(split, walked.runs), scale=exact_mode(spec, seed))
    check(interpret, spec, schedule, m, seed)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("linear 32x64 bf16 2*int8[halves128]", "reads 1 sums of 2 weights"),
        ("linear 32x64 bf16 int8[halves128] -> mul(y0,y1)", "reads 2 sums of 1 weights"),
        ("linear 32x64 bf16 9*int8[halves128] -> mul(y0,y1)", "1 to 4 weights"),
        ("grouped 4 32x64 bf16 int8[halves128] bias", "experts have no bias"),
        ("linear 32x64 bf16 int8[bytes] x:int4[g32]", "tensor cores multiply int8 and float8_e4m3fn"),
        ("linear 32x64 bf16 int8[bytes] x:int8[unscaled]", "have no scale"),
        ("linear 32x64 bf16 int8[bytes] x:int8[2x64]", "a scale a tensor, a token or a block"),
        ("linear 32x64 bf16 int8[bytes] x:int8[g48]", "does not divide"),
        ("linear 32x64 bf16 int8[bytes] bias bias", "no kernel's text"),
        ("grouped x 32x64 bf16 int8[bytes]", "no kernel's text"),
        ("linear 32x64 bf16 int8[bytes] -> ", "no kernel's text"),
    ],
)
def test_what_no_spec_says(text: str, says: str) -> None:
    with pytest.raises(Exception, match=says):
        GemmSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("linear 32x64 bf16 nf4[g64,planar64] x:int8", "has not the values of nf4"),
        ("linear 32x64 bf16 int8[bytes] x:float8_e4m3fn", "has not the values of int8"),
        ("linear 32x64 bf16 int4[g16,planar32] x:int8", "8-bit tensor cores take 32"),
        ("linear 32x262144 bf16 int8[bytes] x:int8", "may not fit in 32 bits"),
    ],
)
def test_what_no_schedule_runs(text: str, says: str) -> None:
    assert says in (Schedule(16, 32, scale="sum").obstacle(GemmSpec.parse(text)) or "")


def test_a_gpu_without_float8_is_told() -> None:
    spec = GemmSpec.parse("linear 32x64 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn")
    with pytest.raises(CodegenError, match=r"from compute capability 8.9 on, not 8.0"):
        Schedule(16, 32).check(spec, 80)
