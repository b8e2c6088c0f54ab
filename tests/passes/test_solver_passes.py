"""Solvers as passes: in a pipeline, behind one another, in the table of the notes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from solver_cases import correlated, error, graph, task
from torch import nn

import bitfold as bf
from bitfold.formats import Quantized
from bitfold.passes import Pipeline, annotated, find_pass, pass_names
from bitfold.passes.algorithms.awq import AWQ
from bitfold.passes.algorithms.balance import Group, Weights
from bitfold.passes.algorithms.clip import Clip
from bitfold.passes.algorithms.descend import Descend
from bitfold.passes.algorithms.draft import DRAFT
from bitfold.passes.algorithms.gptq import GPTQ
from bitfold.passes.algorithms.inputs import INPUTS, Inputs
from bitfold.passes.algorithms.on_model import OnModel
from bitfold.passes.algorithms.refit import Refit
from bitfold.passes.algorithms.solve import Solver


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


def test_scales_below_zero_survive_what_comes_after_clip() -> None:
    one = task("int3[g32]")
    draft = Clip().solve(one)
    assert draft.params is not None and (draft.params[0] < 0).any()
    for step in (GPTQ(), Descend(), Refit()):
        draft = step.solve(dataclasses.replace(one, draft=draft))
    codes = draft.quantized(one.format)
    assert torch.equal(codes.dequantize(), draft.rounded(one.format))
    assert error(one, draft) < error(one, Clip().solve(one))


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
