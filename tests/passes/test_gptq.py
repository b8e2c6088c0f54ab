"""GPTQ: its reason to exist, its codes against the paper's equations written out, moments that are none."""

from __future__ import annotations

import pytest
import torch
from solver_cases import FORMATS, correlated, error, graph, task
from torch import Tensor, nn

import bitfold as bf
from bitfold.passes import Pipeline, annotated
from bitfold.passes.algorithms.columns import column_device
from bitfold.passes.algorithms.draft import Draft
from bitfold.passes.algorithms.follow import Follow
from bitfold.passes.algorithms.gptq import GPTQ, compensate
from bitfold.passes.algorithms.inputs import INPUTS, Inputs
from bitfold.passes.algorithms.moments import damped, factored, inverse_factor
from bitfold.passes.algorithms.solve import Task


@pytest.mark.parametrize("text", FORMATS)
def test_gptq_beats_rounding_on_correlated_inputs(text: str) -> None:
    """Its reason to exist. Same scales: what is won is won by the columns making up for each other."""
    one = task(text, k=256 if text == "tinygemm" else 128, x=correlated(256) if text == "tinygemm" else None)
    plain = error(one, one.draft)
    for actorder in (False, True):
        draft = GPTQ(actorder=actorder).solve(one)
        assert error(one, draft) < 0.9 * plain
        # Every number is one that the format has under the scales of the draft.
        assert torch.equal(one.format.fake_quantize(draft.rounded(one.format), draft.params), draft.values)
        assert torch.equal(draft.quantized(one.format).dequantize(), draft.values)


@pytest.mark.parametrize("text", ["int4[g32]", "mxfp4", "uint4[g32,bf16,zero:int]", "nf4[g64]"])
@pytest.mark.parametrize("actorder", [False, True])
def test_gptq_has_the_codes_of_the_papers_equations(text: str, actorder: bool) -> None:
    """Equations 2 and 3 of arXiv 2210.17323 as they stand: the inverse loses a row and a column each time."""
    one = task(text, rows=8, k=64)
    f, w = one.format, one.weight
    params = f.choose(w)
    h = one.moment.double() + 0.01 * one.moment.diagonal().double().mean() * torch.eye(64).double()
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if actorder else list(range(64))
    left, inverse, expected = w.double().clone(), torch.linalg.inv(h), torch.zeros(8, 64)
    for j in order:
        # The format rounds float32 columns of whole rows; column j of that is what is wanted.
        expected[:, j] = f.fake_quantize(left.float().contiguous(), params)[:, j]
        step = (left[:, j] - expected[:, j].double()) / inverse[j, j]
        left -= step[:, None] * inverse[j][None, :]
        inverse = inverse - inverse[:, j, None] * inverse[None, j, :] / inverse[j, j]
    draft = GPTQ(actorder=actorder, block=16).solve(one)
    same = draft.quantized(f).codes == f.quantize(expected, params).codes
    # float32 compensation against float64: a number in a few thousand sits on a tie.
    assert same.float().mean() > 0.998


def test_gptq_without_correlation_is_rounding() -> None:
    """A diagonal moment leaves nothing to make up for."""
    one = task("int4[g32]")
    assert one.inputs is not None
    one.inputs.moment = torch.diag(torch.rand(128) + 0.5)
    assert torch.equal(GPTQ().solve(one).values, one.draft.rounded(one.format))


def test_blocks_do_not_change_the_result() -> None:
    one = task("int4[g32]")
    factor, order = inverse_factor(one.moment, 0.01), torch.arange(128)

    def whole(column: Tensor, j: int) -> Tensor:
        return column.round()

    w = one.weight * 3
    alike = compensate(w, factor, order, whole, 128) == compensate(w, factor, order, whole, 16)
    assert alike.float().mean() > 0.998


def test_sequential_groups_choose_their_scales_later() -> None:
    one = task("int4[g32]")
    static, late = GPTQ(actorder=False).solve(one), GPTQ(actorder=False, groups="sequential").solve(one)
    assert static.params is not None and late.params is not None
    assert torch.equal(static.params[0][:, 0], late.params[0][:, 0])
    assert not torch.equal(static.params[0][:, 1:], late.params[0][:, 1:])
    # No number is beyond its scale then, which for static scales happens.
    assert error(one, late) < 0.9 * error(one, one.draft)
    assert torch.equal(one.format.fake_quantize(late.rounded(one.format), late.params), late.values)
    with pytest.raises(bf.BitfoldError, match="groups=static"):
        GPTQ(groups="sequential")


def test_channels_that_never_spoke_are_rounded() -> None:
    x = correlated()
    x[:, 5] = 0
    one = task("int4[g32]", x=x)
    values = GPTQ().solve(one).values
    assert values is not None
    assert torch.equal(values[:, 5], one.draft.rounded(one.format)[:, 5])
    silent = Inputs(128)
    quiet = Task("fc", one.format, one.draft, silent)
    assert torch.equal(GPTQ().solve(quiet).values, one.draft.rounded(one.format))


def test_noise_in_a_moment_is_damped_more() -> None:
    """A moment that is not positive (float32 sums of many tokens) gets ten times the damping, everywhere."""
    noisy = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    wanted = damped(noisy.double(), 0.1)
    assert torch.allclose(factored(noisy, 0.01) @ factored(noisy, 0.01).mT, wanted)
    factor = inverse_factor(noisy, 0.01).double()
    assert torch.allclose((factor.mT @ factor).inverse(), wanted, atol=1e-5)
    inputs = Inputs(2)
    inputs.moment, inputs.cross = noisy, noisy + 0.1
    weight = torch.ones(1, 2)
    found = Follow(damping=0.01).solve(Task("fc", bf.format("int4[row]"), Draft(weight), inputs)).weight
    assert torch.allclose(found.double(), weight + 0.2 * torch.ones(1, 2).double() @ wanted.inverse())


@pytest.mark.parametrize("algorithm", ["gptq", "follow"])
def test_a_moment_past_all_damping_is_said_of_its_layer(algorithm: str) -> None:
    gm = graph("int4[row]", nn.Linear(2, 8), torch.randn(4, 2))
    ((node, _),) = annotated(gm)
    inputs = Inputs(2)
    inputs.moment = inputs.cross = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    node.meta[INPUTS] = inputs
    with pytest.raises(bf.BitfoldError, match=r"^layer [^:]+: the second moment of the inputs is not"):
        Pipeline.parse(algorithm).run(gm)


def test_small_matrices_are_rounded_on_the_cpu() -> None:
    """Shapes alone decide; `meta` stands for any device that is no CPU."""
    assert column_device(torch.empty(512, 4096, device="meta")) == torch.device("cpu")
    assert column_device(torch.empty(14336, 4096, device="meta")) == torch.device("meta")
