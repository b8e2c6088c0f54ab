"""Sparsify: an annotation that fold carries into the format; what cannot take it is reported."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitfold.formats import BitfoldError, NofM, format
from bitfold.passes import Annotate, Pipeline, Recipe, Rule, Sparsify, annotated, capture, snapshot


def test_the_whole_graph() -> None:
    gm = capture(nn.Sequential(nn.Linear(8, 2, bias=False)), (torch.zeros(1, 8),))
    trace = Pipeline.parse("annotate{recipe=int4[g8]},sparsify,fold").run(gm)
    assert [step.snapshot.nodes[2].note for step in trace.steps[:3]] == [
        "",
        "int4[g8] weight",
        "int4[g8,2:4] weight",
    ]
    assert str(snapshot(gm)).splitlines() == [
        "input_1: f32[1, 8] = input",
        "_0_weight_codes: u8[2, 2] = self._0_weight_codes",
        "_0_weight_scales: bf16[2, 1] = self._0_weight_scales",
        "_0_weight_indices: u8[2, 1] = self._0_weight_indices",
        "_0_weight_dequantized: f32[2, 8] = bitfold.dequantize.default("
        "[_0_weight_codes, _0_weight_scales, _0_weight_indices], 'int4[g8,2:4]', 8, f32)",
        "linear: f32[1, 2] = aten.linear.default(input_1, _0_weight_dequantized)  # int4[g8,2:4] weight",
        "return (linear,)",
    ]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("text", ["int8", "float8_e4m3fn", "int4[g32]"])
def test_the_largest_are_kept(pattern: str, text: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 16), nn.Conv1d(16, 8, 4)), torch.randn(16, 32)
    model[1].weight.data *= 0.1
    gm = capture(model, (x,))
    trace = Pipeline(
        [Annotate(Recipe("all", (Rule(op="linear|conv", weight=text),))), Sparsify(pattern)]
    ).run(gm)
    assert trace.steps[-1].rewrites == 2
    Pipeline.parse("fold").run(gm)
    fmt = format(f"{text[:-1]},{pattern}]" if "[" in text else f"{text}[{pattern}]")
    linear = fmt.fake_quantize(model[0].weight.detach())
    conv = fmt.fake_quantize(model[1].weight.detach().flatten(1)).view(8, 16, 4)
    assert torch.equal(gm(x), F.conv1d(F.linear(x, linear, model[0].bias), conv, model[1].bias))
    n, m = map(int, pattern.split(":"))
    assert (linear.reshape(16, -1, m) != 0).sum(-1).max() <= n
    assert torch.equal(
        NofM(n, m).mask(model[0].weight.detach()) | (linear == 0), torch.ones(16, 32, dtype=torch.bool)
    )


def test_what_cannot_be_sparse_is_reported() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 6)
            self.odd = nn.Linear(6, 16)
            self.blocks = nn.Linear(16, 16)
            self.inputs = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inputs(self.blocks(self.odd(self.embed(x))))

    recipe = Recipe(
        "mixed",
        (
            Rule(op="embedding", weight="int8"),
            Rule("odd", weight="int8"),
            Rule("blocks", weight="int8[g2]"),
            Rule("inputs", input="int8"),
        ),
    )
    gm = capture(Net(), (torch.zeros(2, 3, dtype=torch.int64),))
    trace = Pipeline([Annotate(recipe), Sparsify()]).run(gm)
    assert {miss.module_path: miss.reason for miss in trace.misses} == {
        "embed": "a row of an embedding is read, not reduced over, so pruning it saves no work",
        "odd": "2:4 sparsity needs a last dimension that 4 divides, not 6",
        "blocks": "with 2:4 sparsity a group is a multiple of 4, not 2",
        "inputs": "its weight has no format for the sparsity to be part of",
    }
    assert not any("2:4" in (note.weight or "") for _, note in annotated(gm))


@pytest.mark.parametrize("pattern", ["2-4", "", "half"])
def test_a_pattern_is_n_of_m(pattern: str) -> None:
    with pytest.raises(BitfoldError, match="a sparsity pattern is n:m as in 2:4"):
        Sparsify(pattern)


def test_a_pattern_that_keeps_all_is_an_error() -> None:
    with pytest.raises(BitfoldError, match="not 4:4"):
        Pipeline.parse("sparsify{pattern=4:4}")
