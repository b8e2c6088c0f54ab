"""Solvers: each one's reason to exist, and GPTQ's codes against the paper's equations written out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitfold as bf
from bitfold.formats import Quantized
from bitfold.passes import Pipeline, annotated, find_pass, pass_names
from bitfold.passes.algorithms.awq import AWQ
from bitfold.passes.algorithms.balance import Group, Weights
from bitfold.passes.algorithms.clip import Clip
from bitfold.passes.algorithms.columns import column_device
from bitfold.passes.algorithms.descend import Descend
from bitfold.passes.algorithms.draft import DRAFT, Draft
from bitfold.passes.algorithms.follow import Follow
from bitfold.passes.algorithms.gptq import GPTQ, compensate
from bitfold.passes.algorithms.hqq import HQQ
from bitfold.passes.algorithms.inputs import INPUTS, Inputs
from bitfold.passes.algorithms.moments import damped, factored, inverse_factor
from bitfold.passes.algorithms.on_model import OnModel
from bitfold.passes.algorithms.refit import Refit
from bitfold.passes.algorithms.solve import Solver, Task

FORMATS = [
    "int4[g32]",
    "int3[g32]",
    "int4[row]",
    "int4[tensor]",
    "int8[16x32]",
    "uint4[g32,bf16,zero:int]",
    "tinygemm",
    "q4_1",
    "nf4[g64]",
    "mxfp4",
    "nvfp4",
    "float8_e4m3fn[row]",
    "ternary",
]


def correlated(k: int = 128, tokens: int = 2048, seed: int = 0) -> Tensor:
    """Activations with a few strong directions, as those of a language model have."""
    torch.manual_seed(seed)
    mix = torch.randn(k // 8, k)
    return torch.randn(tokens, k // 8) @ mix + 0.1 * torch.randn(tokens, k)


def task(text: str, rows: int = 32, k: int = 128, x: Tensor | None = None) -> Task:
    torch.manual_seed(1)
    inputs = Inputs(k)
    inputs.add(correlated(k) if x is None else x)
    return Task("fc", bf.format(text), Draft(torch.randn(rows, k)), inputs)


def error(one: Task, draft: Draft) -> float:
    assert one.inputs is not None
    return float(one.inputs.error(draft.rounded(one.format) - one.weight).sum())


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


def graph(text: str, layer: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    gm = bf.capture(layer, (x,))
    Pipeline.parse(f'annotate{{recipe="{text}"}}').run(gm)
    return gm


def test_a_pipeline_of_solvers_folds_to_their_codes() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 32), correlated()
    gm = graph("int4[g32]", layer, x)
    inputs = Inputs(128)
    inputs.add(x)
    ((node, _),) = annotated(gm)
    node.meta[INPUTS] = inputs
    trace = Pipeline.parse("clip,gptq{actorder=false}").run(gm)
    assert [step.rewrites for step in trace.steps[1:]] == [1, 1]
    draft = node.meta[DRAFT]
    Pipeline.parse("fold").run(gm)
    folded = gm(x)
    assert torch.allclose(folded, torch.nn.functional.linear(x, draft.values, layer.bias), atol=1e-4)
    assert DRAFT not in node.meta


def test_a_convolution_is_clipped_and_says_that_gptq_has_no_inputs() -> None:
    torch.manual_seed(0)
    gm = bf.capture(nn.Conv2d(8, 8, 3), (torch.randn(1, 8, 8, 8),))
    recipe = bf.Recipe("conv", (bf.Rule(op="conv", weight="int4[row]"),))
    trace = Pipeline.parse(f"annotate{{recipe={recipe}}},clip,gptq,fold").run(gm)
    assert [step.rewrites for step in trace.steps[1:4]] == [1, 1, 0]
    assert "every column's error counts alike" in str(trace.misses[0])
    assert "no such statistics" in str(trace.misses[1])


def test_training_forgets_drafts() -> None:
    layer = nn.Linear(64, 8)
    gm = graph("int4[g32]", layer, torch.randn(4, 64))
    Pipeline.parse("clip,fake_quantize").run(gm)
    assert not any(DRAFT in node.meta for node in gm.graph.nodes)


def test_codes_may_be_given_instead_of_a_draft() -> None:
    layer = nn.Linear(64, 8)
    gm = graph("int4[g32]", layer, torch.randn(4, 64))
    codes = bf.format("int4[g32]").quantize(torch.ones(8, 64))
    ((node, _),) = annotated(gm)
    node.meta[DRAFT] = codes
    assert isinstance(codes, Quantized)
    Pipeline.parse("fold").run(gm)
    assert torch.allclose(gm(torch.ones(4, 64)), codes.dequantize().sum(1) + layer.bias)


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


def test_scales_below_zero_survive_what_comes_after_clip() -> None:
    one = task("int3[g32]")
    draft = Clip().solve(one)
    assert draft.params is not None and (draft.params[0] < 0).any()
    for step in (GPTQ(), Descend(), Refit()):
        draft = step.solve(dataclasses.replace(one, draft=draft))
    codes = draft.quantized(one.format)
    assert torch.equal(codes.dequantize(), draft.rounded(one.format))
    assert error(one, draft) < error(one, Clip().solve(one))


def test_small_matrices_are_rounded_on_the_cpu() -> None:
    """Shapes alone decide; `meta` stands for any device that is no CPU."""
    assert column_device(torch.empty(512, 4096, device="meta")) == torch.device("cpu")
    assert column_device(torch.empty(14336, 4096, device="meta")) == torch.device("meta")


def test_awq_chooses_for_clipped_scales_if_clip_follows() -> None:
    torch.manual_seed(0)
    one = task("int3[g32]", x=correlated() * torch.linspace(0.1, 4, 128))
    weights = Weights(Group(("fc",), (), 128), [(one.weight, one.format)], [], one.inputs)
    plain, clipped = AWQ().factors(weights), AWQ(clip=True).factors(weights)
    assert plain is not None and clipped is not None
    judge = AWQ(clip=True)
    assert judge._error(weights, clipped) < judge._error(weights, plain)


def test_every_option_is_in_the_table() -> None:
    """docs/notes/ptq.md: each pass with all its options at their defaults."""
    text = (Path(__file__).parents[2] / "docs/notes/ptq.md").read_text()
    table = re.findall(r"^\| `([a-z_]+(?:\{[^`]*\})?)` \|", text, re.MULTILINE)
    rows = {
        spelled.partition("{")[0]: spelled for spelled in table if spelled.partition("{")[0] in pass_names()
    }
    kinds = [find_pass(name) for name in pass_names()]
    algorithms = {kind.name: kind for kind in kinds if issubclass(kind, Solver | OnModel)}
    assert rows.keys() >= {name for name, kind in algorithms.items() if kind.__module__.startswith("bitfold")}
    for name, spelled in rows.items():
        assert Pipeline.parse(spelled).passes == (algorithms[name](),)
        assert all(f"{field.name}=" in spelled for field in dataclasses.fields(algorithms[name]))
