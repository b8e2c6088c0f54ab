"""A weight while it is learned: where it starts, its slopes, and that every value is the format's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bitfold as bf
from bitfold.formats.fit import multipliers
from bitfold.passes.algorithms.draft import Draft
from bitfold.passes.algorithms.rounding import Rounding

FORMATS = ["int4[g32]", "int3[row]", "int4[tensor]", "nf4[g32]", "mxfp4", "nvfp4", "uint4[g32,bf16,zero:int]"]


def made(text: str, rows: int = 8, k: int = 64) -> tuple[Rounding, Tensor, Tensor]:
    """A rounding of values that a solver has moved off the nearest ones; the weight; the values."""
    torch.manual_seed(0)
    f, w = bf.format(text), torch.randn(rows, k)
    params = f.choose(w)
    near = Rounding(f, Draft(w, params))
    values = f.fake_quantize(w + 0.6 * near.gap * torch.randn_like(w).clamp(-1, 1), params)
    return Rounding(f, Draft(w, params, values)), w, values


@pytest.mark.parametrize("text", FORMATS)
def test_it_starts_at_what_was_decided(text: str) -> None:
    one, w, values = made(text)
    assert torch.allclose(one.values(), values, atol=1e-6)
    assert torch.equal(one.draft().rounded(one.format), values)
    nearest = one.format.fake_quantize(w, one.first) == values
    assert (one.shift[nearest] == 0).all() and not nearest.all()
    if "int" in text:  # evenly spaced: just inside, and on the weight's side
        turned = ~nearest & ((values - w).abs() < 1.4 * one.gap)
        left = (one.place() - values).abs() / one.gap
        assert torch.allclose(left[turned], torch.tensor(0.45), atol=1e-4)


@pytest.mark.parametrize("text", ["int4[g32,f32]", "int3[row,f32]", "int4[tensor,f32]", "nf4[g32,f32]"])
def test_the_slope_of_a_scale_is_that_of_what_is_rounded(text: str) -> None:
    one, _, values = made(text)
    gradient = torch.randn_like(values)
    by_shift, by_stretch = one.slopes(gradient, values)
    assert torch.allclose(by_shift, gradient * one.gap)
    assert by_stretch.shape == one.first[0].shape
    # Scales of float32, so that none is rounded to: the difference quotient is the slope.
    step, before = 1e-3, one.values()
    assert one.stretch is not None
    one.stretch += step
    grain = one.format.scale.granularity  # type: ignore[union-attr]
    assert torch.allclose(grain.means(gradient * (one.values() - before)) / step, by_stretch, atol=2e-3)


def test_codes_stay_while_scales_move() -> None:
    for text in ("int4[g32]", "nvfp4", "nf4[g32]", "int3[row]"):
        one, _, values = made(text)
        assert one.stretch is not None
        one.stretch += 0.3 * torch.randn_like(one.stretch)
        before, after = multipliers(one.format, one.first), multipliers(one.format, one.params())
        grain = one.format.scale.granularity  # type: ignore[union-attr]
        wanted = grain.split(values) * grain.spread(after / before)
        same = torch.isclose(one.values(), wanted.reshape(values.shape), rtol=1e-5)
        assert same.float().mean() > 0.99  # all but numbers that lie on an edge to the last bit
        assert not torch.equal(before, after)


@pytest.mark.parametrize("text", FORMATS)
def test_what_was_moved_is_still_the_formats_own(text: str) -> None:
    one, _, _ = made(text)
    one.shift += 0.7 * torch.randn_like(one.shift)
    if one.stretch is not None:
        one.stretch += 0.05 * torch.randn_like(one.stretch)
    one.bound()
    assert float(one.shift.abs().max()) <= 1.5
    one.keep()
    draft = one.draft()
    assert torch.equal(draft.quantized(one.format).dequantize(), draft.rounded(one.format))


def test_powers_of_two_and_zero_points_stay() -> None:
    for text in ("mxfp4", "uint4[g32,bf16,zero:int]"):
        one, _, values = made(text)
        assert one.stretch is None and len(one.slopes(torch.ones_like(values), values)) == 1


def test_a_scale_below_zero_keeps_its_sign() -> None:
    torch.manual_seed(0)
    f, w = bf.format("int3[g32]"), torch.randn(4, 32)
    one = Rounding(f, Draft(w, (-f.choose(w)[0],)))
    assert one.stretch is not None
    one.stretch += 0.3
    assert (multipliers(f, one.params()) < 0).all()
