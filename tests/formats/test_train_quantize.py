"""Gradients of the rounding that trains, against closed forms written here; values against `quantize`."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bitfold.formats import FormatError, describe, format, learned, round_groups
from bitfold.formats.cells import neighbours
from bitfold.formats.estimators import ESTIMATORS
from bitfold.formats.estimators.smooth import staircase_slope
from bitfold.formats.gradient import Gradient
from bitfold.formats.train_quantize import params

OP = torch.ops.bitfold.train_quantize
CATALOG = [row.name for row in describe()]


def grads(text: str, gradient: str, x: Tensor, held: list[Tensor], flow: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    held = [part.clone().requires_grad_() for part in held]
    value = OP(x, text, gradient, held)
    value.backward(flow)
    return value.detach(), x.grad, *(part.grad for part in held)


@pytest.mark.parametrize("text", CATALOG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_quantize_for_the_whole_catalog(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fmt, x = format(text), torch.randn(4, 256).to(dtype)
    for gradient in ("straight", "clip", "smooth"):
        value = OP(x.clone().requires_grad_(), text, gradient, [])
        assert value.dtype == dtype and torch.equal(value, fmt.quantize(x).dequantize(dtype))
    step = learned.learned(fmt, fmt.choose(x))
    moved = [part * 0.9 for part in step]
    value = OP(x.clone().requires_grad_(), text, "lsq", moved)
    assert torch.equal(value, fmt.quantize(x, params(fmt, Gradient("lsq"), moved)).dequantize(dtype))


@pytest.mark.parametrize("text", CATALOG)
def test_learned_scales_begin_as_rounding_has_them(text: str) -> None:
    fmt, x = format(text), torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    chosen = fmt.choose(x)
    again = learned.stored(fmt, learned.learned(fmt, chosen))
    assert [part.dtype for part in again] == [part.dtype for part in chosen]
    # The second level of nvfp4 is divided by 448 again, which may round; its block scales stay.
    exact = zip(chosen[:1] if fmt.scale.two_level else chosen, again, strict=False)
    assert all(torch.equal(a.float(), b.float()) for a, b in exact)


def test_nearest_power_of_two_is_that_of_log2_everywhere() -> None:
    fmt = format("mxfp4")
    for byte in range(255):
        value = torch.tensor([2.0], dtype=torch.float64).pow(byte - 127).to(torch.float32)
        assert int(learned.stored(fmt, [value])[0]) == byte
    steps = torch.tensor([0.7499, 0.75, 1.499, 1.5, 3.1])
    assert (learned.stored(fmt, [steps])[0].int() - 127).tolist() == [-1, 0, 0, 1, 2]
    assert int(learned.stored(fmt, [torch.tensor([math.nan])])[0]) == 255


def test_straight_and_clip_by_hand() -> None:
    # int4 under scale 1/15 of a range -0.5..0.5: codes reach from -8 to 7, half a step beyond passes.
    low, high = torch.tensor([[-0.75]]), torch.tensor([[0.75]])  # scale 0.75 / 7.5 = 0.1
    x = torch.tensor([[-0.86, -0.84, -0.1, 0.0, 0.74, 0.76]])
    flow = torch.arange(1.0, 7.0).reshape(1, 6)
    value, straight = (t.detach() for t in _range("straight", x, low, high, flow))
    assert torch.allclose(value, torch.tensor([[-0.8, -0.8, -0.1, 0.0, 0.7, 0.7]]))
    assert torch.equal(straight, flow)
    _, clipped = _range("clip", x, low, high, flow)
    assert torch.equal(clipped, flow * torch.tensor([[0.0, 1, 1, 1, 1, 0]]))


def _range(gradient: str, x: Tensor, low: Tensor, high: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = OP(x, "int4[tensor]", gradient, [low, high])
    value.backward(flow)
    assert x.grad is not None
    return value.detach(), x.grad


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.sampled_from([1, 4]), st.integers(1, 5), st.integers(0, 10**6))
def test_lsq_is_the_papers_formula(bits: int, groups: int, rows: int, seed: int) -> None:
    """arXiv 1902.08153, equations 2 to 4, element by element in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator)
    flow = torch.randn(rows, 16, generator=generator)
    step = torch.rand(rows, groups, generator=generator) / 2 ** (bits - 2) + 0.01
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    value, for_x, for_step = grads(f"int{bits}[g{16 // groups},f32]", "lsq", x, [step], flow)
    wanted_x, wanted_step = torch.zeros(rows, 16), torch.zeros(rows, groups, dtype=torch.float64)
    for i in range(rows):
        for j in range(16):
            s = step[i, j // (16 // groups)]
            ratio = float(x[i, j] / s)
            if ratio <= least or ratio >= most:
                slope = least if ratio <= least else most
            else:
                slope = round(float(x[i, j] * (1 / s))) - ratio
                wanted_x[i, j] = flow[i, j]
            wanted_step[i, j // (16 // groups)] += float(flow[i, j]) * slope
            code = min(max(round(float(x[i, j] * (1 / s))), least), most)
            assert abs(float(value[i, j]) - code * float(s)) < 1e-6
    wanted_step /= math.sqrt(16 // groups * most)
    # 16 terms of at most 128 in float32: 16 * 128 * 2**-23 * |flow| is below 1e-3 before the division.
    assert torch.equal(for_x, wanted_x)
    assert torch.allclose(for_step.double(), wanted_step, atol=1e-3)


def test_lsq_plus_learns_where_the_range_begins() -> None:
    """2004.09576: 1 outside of the range for the offset; the code, or the rounding error, for the step."""
    step, low = torch.tensor([[0.5]]), torch.tensor([[-1.0]])
    x = torch.tensor([[-3.0, -0.9, 0.2, 9.0]])
    flow = torch.ones(1, 4)
    value, for_x, for_step, for_low = grads("uint4[tensor,zero:min]", "lsq", x, [step, low], flow)
    assert torch.equal(value, torch.tensor([[-1.0, -1.0, 0.0, 6.5]]))
    assert torch.equal(for_x, torch.tensor([[0.0, 1, 1, 0]]))
    factor = 1 / math.sqrt(4 * 15)
    assert torch.allclose(for_low, torch.tensor([[2 * factor]]))
    assert torch.allclose(
        for_step, torch.tensor([[factor * (0 + (-1.0 + 0.9) / 0.5 + (0 - 0.2) / 0.5 + 15)]])
    )


def test_lsq_of_an_activation_counts_one_item() -> None:
    x, step = torch.randn(5, 3, 8), torch.full((1, 1, 1), 0.1)
    flow = torch.randn(5, 3, 8)
    *_, whole = grads("int8[tensor]", "lsq", x, [step], flow)
    *_, item = grads("int8[tensor]", "lsq+item", x, [step], flow)
    assert torch.allclose(item, whole * math.sqrt(5))


@pytest.mark.parametrize("text", ["int2f1[g16]", "int4[g16]"])
def test_lsq_counts_alike_where_sizes_are_symbols(text: str) -> None:
    """Also where the largest value, 0.5 of int2f1, is below 1, which is the least that counts."""

    def of_step(x: Tensor, step: Tensor) -> Tensor:
        value = OP(x, text, "lsq+item", [step])
        return torch.autograd.grad((value * x.detach().sin()).sum(), step)[0]

    x, step = torch.randn(6, 3, 16), torch.full((6, 3, 1), 0.2, requires_grad=True)
    traced = make_fx(of_step, tracing_mode="symbolic")(x, step)
    assert "sym_size" in traced.code
    torch.testing.assert_close(traced(x, step), of_step(x, step), rtol=1e-6, atol=0)


def test_pact_is_the_papers_formula() -> None:
    """1805.06085: dy/dalpha = 1 where x >= alpha, else 0; dy/dx = 1 below alpha. Signed: -1 below as well."""
    end = torch.tensor([[1.5]])
    x = torch.tensor([[-0.1, 0.2, 1.4, 1.5, 7.0]])
    flow = torch.tensor([[1.0, 2, 3, 4, 5]])
    value, for_x, for_end = grads("uint4[tensor]", "pact", x, [end], flow)
    assert torch.allclose(value, torch.tensor([[0.0, 0.2, 1.4, 1.5, 1.5]]))
    assert torch.equal(for_x, flow * torch.tensor([[0.0, 1, 1, 0, 0]]))
    assert torch.equal(for_end, torch.tensor([[9.0]]))
    value, for_x, for_end = grads("float8_e4m3fn[tensor]", "pact", -x, [end], flow)
    assert torch.equal(for_end, torch.tensor([[-9.0]]))


@pytest.mark.parametrize(
    "text", ["int4", "int2", "mxfp4", "float6_e3m2", "nf4", "ternary", "uint4[g128,zero]"]
)
def test_smooth_slope_averages_to_one_and_is_steepest_between_values(text: str) -> None:
    element = format(text).element
    for sharpness in (1.0, 5.0, 20.0):
        u = torch.linspace(element.low, element.high, 400_001)[:-1].double()
        mean = staircase_slope(element, u, sharpness).mean()
        assert abs(float(mean) - 1) < 1e-2
    slope = staircase_slope(element, u, 5.0)
    below, above = neighbours(element, u)
    way = (u - below) / (above - below)
    assert slope[(way - 0.5).abs() < 0.01].min() > slope[(way < 0.05) & (above > below)].max()


@pytest.mark.parametrize(
    "text", ["int4", "int8f6", "float4_e2m1", "float8_e4m3fn", "nf4", "ternary", "binary"]
)
def test_neighbours_hold_a_number_between_them(text: str) -> None:
    element = format(text).element
    values = torch.tensor(sorted({v for v in element.values() if math.isfinite(v)}))
    u = torch.cat([values, torch.linspace(element.low - 1, element.high + 1, 999)])
    below, above = neighbours(element, u)
    inside = (u >= element.low) & (u <= element.high)
    assert torch.equal((below <= u)[inside], (above >= u)[inside])
    assert torch.isin(below, values).all() and torch.isin(above, values).all()
    gaps = torch.searchsorted(values, above) - torch.searchsorted(values, below)
    assert set(gaps[inside].tolist()) <= {0, 1}
    assert torch.equal(below[~inside], u[~inside].clamp(element.low, element.high))


@pytest.mark.parametrize(
    "text", ["int4", "int2[g16]", "uint4[g16,zero]", "mxfp4", "nvfp4", "float8_e5m2", "nf4[g32]"]
)
def test_stochastic_rounding_is_right_on_average_and_stays_on_the_values(text: str) -> None:
    torch.manual_seed(0)
    fmt = format(text)
    x = torch.rand(8, 64) * 2 - 1
    scales = fmt.choose(x)
    draws = torch.stack([OP(x, text, "straight+stochastic", [], True) for _ in range(400)])
    assert torch.equal(fmt.fake_quantize(draws[0], scales), draws[0])
    u, step, _ = learned.units(fmt, x, scales)
    below, above = neighbours(fmt.element, u)
    width = ((above - below) * step).reshape(x.shape)
    inside = width > 0
    # 512 means of 400 draws of deviation width / 2 at most: five deviations of the mean.
    error = (draws.mean(0) - x).abs()
    assert (error[inside] < 5 * width[inside] / 2 / 20).all()
    assert torch.equal(OP(x, text, "straight+stochastic", [], False), fmt.fake_quantize(x))


def test_warmup_gives_x_itself_and_its_gradient() -> None:
    x = torch.randn(2, 16, requires_grad=True)
    for clock, is_x in ((0, True), (2, True), (3, False)):
        value = OP(x, "int4", "clip", [], True, torch.tensor(clock), 3)
        assert torch.equal(value, x) == is_x
        assert torch.equal(
            OP(x, "int4", "clip", [], False, torch.tensor(clock), 3), format("int4").fake_quantize(x)
        )
    x.grad = None
    OP(x, "int4", "lsq", [torch.full((2, 1), 1e-3)], True, torch.tensor(0), 3).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # clipped everywhere, were it rounded


def test_an_unseen_range_is_that_of_the_batch_and_observing_widens() -> None:
    x = torch.tensor([[-1.0, 3.0]])
    low, high = torch.full((1, 1), torch.inf), torch.full((1, 1), -torch.inf)
    value = OP(x, "int8[tensor]", "clip", [low, high], True)
    assert torch.equal(value, format("int8[tensor]").fake_quantize(x))
    for _ in range(2):  # the same twice is the same
        torch.ops.bitfold.observe_range(x, low, high, True)
        assert (low.item(), high.item()) == (-1.0, 3.0)
    torch.ops.bitfold.observe_range(x * 2, low, high, False)
    assert (low.item(), high.item()) == (-1.0, 3.0)


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_gradient_prints_and_parses(kind: str, stochastic: bool) -> None:
    for number in (None, 7.0, 5.123456789, 1e-20) if kind == "smooth" else (None,):
        one = Gradient(kind, number, stochastic)
        assert Gradient.parse(str(one)) == one


@pytest.mark.parametrize(
    "text", ["lsqq", "lsq:3", "smooth:x", "clip+wild", "smooth:0", "smooth:nan", "clip+stochastic+kernel"]
)
def test_what_is_no_gradient_is_one_sentence(text: str) -> None:
    with pytest.raises(FormatError):
        Gradient.parse(text)


@pytest.mark.parametrize(
    "kind,seen",
    [("straight", 1), ("straight+fused", 0), ("straight+kernel", 1), ("clip", 0), ("clip+kernel", 1)],
)
def test_an_operator_of_its_own_is_taken_where_a_device_has_a_kernel(
    monkeypatch: pytest.MonkeyPatch, kind: str, seen: int
) -> None:
    monkeypatch.setitem(round_groups.KERNELS, "cpu", lambda x, text: text == "int4[g16]")
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(function is torch.ops.bitfold.round_groups.default)
            return function(*args, **(kwargs or {}))

    x = torch.randn(6, 32, requires_grad=True)
    with Watch():
        y = torch.ops.bitfold.train_quantize(x, "int4[g16]", kind, [], True)
    assert sum(calls) == seen
    assert torch.equal(y, format("int4[g16]").fake_quantize(x.detach()))
    y.sum().backward()
    assert "clip" in kind or torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("kind", ["straight", "clip", "lsq", "pact", "smooth:3"])
@pytest.mark.parametrize("text", ["int4[g16]", "uint4[g16,zero]", "int8", "mxfp4", "nvfp4", "int8[tensor]"])
def test_by_an_operator_of_its_own_it_is_the_same(text: str, kind: str) -> None:
    """Without a kernel registered for the device both run the reference, forward and backward."""
    fmt = format(text)
    if kind == "pact" and fmt.scale.zero != "none":
        pytest.skip("pact has no zero points")
    torch.manual_seed(0)
    found = []
    for flag in ("", "+kernel"):
        torch.manual_seed(0)
        x = torch.randn(6, 32, requires_grad=True)
        held = []
        if kind in ("lsq", "pact"):
            held = [part * 0.7 for part in learned.learned(fmt, fmt.choose(x.detach()))][
                : 1 if kind == "pact" else 2
            ]
            held = [part.requires_grad_() for part in held]
        y = torch.ops.bitfold.train_quantize(x, text, kind + flag, held, True)
        (y * torch.randn_like(y)).sum().backward()
        found.append([y, x.grad, *(part.grad for part in held)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "text", ["int2[g32]", "int3[g32,bf16]", "int4[g32,bf16]", "float8_e4m3fn[tensor,bf16]"]
)
@pytest.mark.parametrize("gradient", ["clip", "smooth:5"])
def test_what_chose_its_own_scale_is_never_without_a_gradient(text: str, gradient: str) -> None:
    w = torch.randn(512, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    OP(w, text, gradient, [], True).sum().backward()
    assert int((w.grad == 0).sum()) == 0
    if gradient == "clip":
        assert torch.equal(w.grad, torch.ones_like(w))


def test_torch_func_differentiates_what_goes_straight_and_refuses_the_rest() -> None:
    w = torch.randn(2, 32)
    found = torch.func.grad(lambda w: (OP(w, "int4[g32]", "straight", []) * 3.0).sum())(w)
    assert torch.equal(found, torch.full_like(w, 3.0))
    with pytest.raises(
        FormatError, match=r"torch\.func differentiates the gradient 'straight' only, not 'clip'"
    ):
        torch.func.grad(lambda w: OP(w, "int4[g32]", "clip", []).sum())(w)
