"""Solvers other than GPTQ, each one's reason to exist; and the moments that all of them read."""

from __future__ import annotations

import pytest
import torch
from solver_cases import FORMATS, correlated, error, task
from torch import Tensor

import bitfold as bf
from bitfold.passes.algorithms.clip import Clip
from bitfold.passes.algorithms.descend import Descend
from bitfold.passes.algorithms.draft import Draft
from bitfold.passes.algorithms.gptq import GPTQ
from bitfold.passes.algorithms.hqq import HQQ
from bitfold.passes.algorithms.inputs import Inputs
from bitfold.passes.algorithms.refit import Refit
from bitfold.passes.algorithms.solve import Task


def test_the_moment_is_the_output_error() -> None:
    x, one = correlated(), task("int4[g32]")
    difference = torch.randn(32, 128)
    assert one.inputs is not None
    direct = (x.double() @ difference.double().mT).square().mean(0)
    # 2048 products of float32 in batches: 2048 eps is an upper bound of their relative error.
    assert torch.allclose(one.inputs.error(difference).double(), direct, rtol=2048 * 2**-24)


def test_inputs_add_up_over_batches() -> None:
    x = correlated()
    whole, parts = Inputs(128), Inputs(128)
    whole.add(x)
    for piece in x.split([100, 1000, 948]):
        parts.add(piece)
    assert parts.count == whole.count
    for name in ("moment", "peak", "magnitude"):
        scale = float(getattr(whole, name).abs().max())
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=scale * 2048 * 2**-24)


def test_nan_is_refused() -> None:
    with pytest.raises(bf.BitfoldError, match="NaN"):
        Inputs(4).add(torch.tensor([[1.0, 2.0, float("nan"), 0.0]]))


@pytest.mark.parametrize(
    "text",
    [text for text in FORMATS if text not in ("mxfp4", "float8_e4m3fn[row]", "int8[16x32]")]
    + ["int4[16x32]"],
)
def test_clip_lowers_the_error_of_every_block(text: str) -> None:
    one = task(text, k=256 if text == "tinygemm" else 128, x=correlated(256) if text == "tinygemm" else None)
    one.weight[:, 3] *= 6  # outliers are what clipping is about
    f = one.format
    grain = f.scale.granularity  # type: ignore[union-attr]
    clipped = Clip(weighted=False).solve(one)

    def blocks(draft: Draft) -> Tensor:
        return grain.means((draft.rounded(f) - one.weight) ** 2)

    assert (blocks(clipped) <= blocks(one.draft)).all()
    assert blocks(clipped).sum() < 0.97 * blocks(one.draft).sum()


@pytest.mark.parametrize(("text", "share"), [("int3[g32]", 1 / 6), ("int4[g64]", 1 / 10)])
def test_scales_of_both_signs_take_off_what_the_docstring_says(text: str, share: float) -> None:
    """Of normal numbers, over clipping alone; to a hundredth of the error."""
    torch.manual_seed(0)
    one = Task("fc", bf.format(text), Draft(torch.randn(256, 1024)), None)
    clipped = (Clip(weighted=False, signed=signed).solve(one) for signed in (True, False))
    both, above = (float((draft.rounded(one.format) - one.weight).square().sum()) for draft in clipped)
    assert 1 - both / above == pytest.approx(share, abs=0.01)


def test_clip_cuts_where_the_inputs_are_small() -> None:
    x = correlated()
    x[:, :4] *= 0.01
    one = task("int3[g32]", x=x)
    one.weight[:, 0] *= 8  # large numbers on a channel that says nothing
    seeing, blind = (Clip(weighted=weighted, signed=False).solve(one) for weighted in (True, False))
    assert error(one, seeing) < 0.5 * error(one, blind)


def test_clip_moves_powers_of_two() -> None:
    one = task("mxfp4")
    first = one.format.choose(one.weight)
    clipped = Clip(weighted=False).solve(one)
    assert clipped.params is not None
    moved = clipped.params[0].int() - first[0].int()
    assert set(moved.unique().tolist()) <= {-2, -1, 0, 1} and moved.any()


@pytest.mark.parametrize("text", ["int3[g32]", "int4[g32]", "tinygemm", "q4_1", "nf4[g64]"])
def test_hqq_fits_all_but_the_outliers(text: str) -> None:
    """Less p-norm on heavy tails, which is its aim; the plain scale spans the tails."""
    one = task(text, k=256 if text == "tinygemm" else 128, x=correlated(256) if text == "tinygemm" else None)
    weight = torch.distributions.StudentT(3.0).sample(one.weight.shape)
    draft = Draft(weight)
    found = HQQ().solve(Task("fc", one.format, draft, None))

    def size(given: Draft) -> float:
        return float(((given.rounded(one.format) - weight).abs() ** 0.7).mean())

    assert size(found) < 0.99 * size(draft)


@pytest.mark.parametrize("text", FORMATS)
def test_hqq_makes_no_block_worse(text: str) -> None:
    """Also where scales or zero points are so coarse that a least-squares step rounds back."""
    one = task(text, k=256 if text == "tinygemm" else 128, x=correlated(256) if text == "tinygemm" else None)
    f = one.format
    grain = f.scale.granularity  # type: ignore[union-attr]

    def blocks(draft: Draft) -> Tensor:
        return grain.means((draft.rounded(f) - one.weight).abs() ** 0.7)

    assert (blocks(HQQ().solve(one)) <= blocks(one.draft)).all()


@pytest.mark.parametrize("text", FORMATS)
def test_descending_never_raises_the_error(text: str) -> None:
    """Every step is the best for its column; float32 sums of 128 products leave 1e-4 of doubt."""
    one = task(text, k=256 if text == "tinygemm" else 128, x=correlated(256) if text == "tinygemm" else None)
    rounded = GPTQ().solve(one)
    once = Descend(sweeps=1, damping=0.0).solve(Task("fc", one.format, rounded, one.inputs))
    twice = Descend(sweeps=3, damping=0.0).solve(Task("fc", one.format, rounded, one.inputs))
    assert error(one, once) < error(one, rounded)
    assert error(one, twice) <= error(one, once) * (1 + 1e-4)
    assert torch.equal(one.format.fake_quantize(twice.rounded(one.format), twice.params), twice.values)


def test_a_descent_ends_where_no_single_column_helps() -> None:
    one = task("int4[g32]", rows=4, k=32)
    f, x = one.format, correlated(32)
    inputs = Inputs(32)
    inputs.add(x)
    done = Descend(sweeps=50, damping=0.0).solve(Task("fc", f, one.draft, inputs))
    assert done.values is not None and done.params is not None
    least = inputs.error(done.values - one.weight)
    step = f.scale.decode(done.params[0])  # type: ignore[union-attr]
    for j in range(32):
        for sign in (-1, 1):
            other = done.values.clone()
            other[:, j] += sign * step[:, 0]
            inside = (other[:, j] / step[:, 0] < 7.5) & (other[:, j] / step[:, 0] > -8.5)
            assert (inputs.error(other - one.weight) >= least * (1 - 1e-4))[inside].all()


@pytest.mark.parametrize("text", ["int3[g32]", "int4[row]", "nf4[g64]", "nvfp4"])
def test_refit_lowers_the_output_error_under_the_same_codes(text: str) -> None:
    one = task(text)
    rounded = GPTQ().solve(one)
    again = Refit().solve(Task("fc", one.format, rounded, one.inputs))
    assert error(one, again) < error(one, rounded)
    assert torch.equal(again.quantized(one.format).codes, rounded.quantized(one.format).codes)


def test_refit_finds_scales_that_were_lost() -> None:
    """Codes times known scales; the draft comes with scales that are 10 % off."""
    one = task("int8[g32,f32]")
    f = one.format
    params = f.choose(one.weight)
    truth = f.fake_quantize(one.weight, params)
    off = (params[0] * 1.1,)
    found = Refit(damping=1e-6).solve(Task("fc", f, Draft(truth, off, truth * 1.1), one.inputs))
    assert found.params is not None
    assert torch.allclose(found.params[0], params[0], rtol=1e-3)


def test_clip_turns_blocks_to_the_longer_side() -> None:
    """int3 reaches from -4 to 3: a block of one large positive number has it exact under a scale below 0."""
    w = torch.tensor([[4.0, 1.0, -1.0, 2.0, 0.0, 3.0, -2.0, 1.0]])
    f = bf.format("int3[g8]")
    kept, turned = (Clip(weighted=False, signed=one).search(f, w) for one in (False, True))
    assert kept[0].item() > 0 and (f.fake_quantize(w, kept) != w).any()
    assert turned[0].item() < 0
    lost, kept_loss = ((f.fake_quantize(w, params) - w).square().sum() for params in (turned, kept))
    assert lost < 0.2 * kept_loss


@pytest.mark.parametrize("text", ["int8[g32]", "uint4[g32,zero:int]", "nvfp4", "mxfp4", "nf4[g32]"])
def test_clip_leaves_signs_where_no_side_is_longer(text: str) -> None:
    torch.manual_seed(0)
    w, f = torch.randn(8, 64), bf.format(text)
    found, unsigned = (Clip(weighted=False, signed=one).search(f, w) for one in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, unsigned, strict=True))
