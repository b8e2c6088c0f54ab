"""What can be drawn beside an inspection: graphs, modules, compiled functions, traces; each with all that is
known of it.

a small net -> quantize, torch.compile, a pipeline -> subject -> stages, kernels, times, errors
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import Net
from torch import Tensor

from bitfold.formats.errors import BitfoldError
from bitfold.lowering import Pipeline, quantize
from bitfold.passes.scopes.program import capture
from bitfold.tools.explain import explain
from bitfold.tools.inspection import Inspection, inspect
from bitfold.tools.viz import page_text, viz
from bitfold.tools.viz.data import page_data
from bitfold.tools.viz.overlay import overlay_data
from bitfold.tools.viz.subject import Subject, subject

X = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)),)
LOWERED = ["captured", "annotate", "fold", "fuse", "lower", "finish"]


class Broken(Net):
    """Its graph breaks between the layers."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        torch._dynamo.graph_break()
        return self.down(torch.relu(hidden) + 1.0)


def known(given: Subject) -> Inspection:
    assert given.inspection is not None
    return given.inspection


def test_a_graph_and_a_quantized_module_are_shown_with_kernels_and_times() -> None:
    gm = capture(Net().eval(), X)
    assert [step.name for step in subject(gm).trace.steps] == ["captured"]
    assert known(subject(gm, X)).work["linear"].seconds is not None
    drawn = subject(quantize(Net().eval(), "int8"), X)
    records = {record["name"]: record for record in page_data(drawn.trace)["records"]}
    kinds = [
        (name, records[name]["kind"], records[name]["format"]) for name in ("fused", "up_codes", "up_bias")
    ]
    assert kinds == [("fused", "fused", "int8"), ("up_codes", "weight", "int8"), ("up_bias", "parameter", "")]
    found = known(drawn)
    assert [kernel.spec for kernel in found.kernels.values()] == [
        "linear 96x64 f32 int8 bias",
        "linear 64x96 f32 int8 bias",
    ]
    done = found.work["fused"]
    assert done.flops == 2 * 4 * 96 * 64 and done.seconds is not None and done.seconds > 0
    assert overlay_data(found)["kernels"]["fused"]["roof_us"] > 0
    assert not drawn.explained, "nobody knows the model before, so nothing is found wrong with it"


def test_a_compiled_function_is_shown_with_all_that_the_backend_made_of_it() -> None:
    """The same figures as those of an inspection of the model: one pipeline, captured in two ways."""
    model = Net().eval()
    fast = torch.compile(model, backend="bitfold", options={"recipe": "int4[g32]", "target": "cpu"})
    drawn = subject(fast, X)
    assert [step.name for step in drawn.trace.steps] == LOWERED
    found = known(drawn)
    asked = inspect(model, 'annotate{recipe="int4[g32]"},fold,fuse,lower{target=cpu}', X, runs=0)
    assert [k.spec for k in found.kernels.values()] == [k.spec for k in asked.kernels.values()]
    assert all(found.work[name].seconds for name in found.kernels)
    ours, theirs = explain(found), explain(asked)
    assert ours.weight_bytes == theirs.weight_bytes
    assert ours.error_db == pytest.approx(theirs.error_db, abs=1e-3)
    told = [replace(row, seconds=0.0) for row in ours.rows]
    for mine, other in zip(told, theirs.rows, strict=True):
        assert replace(mine, own_db=None) == replace(other, own_db=None)
        assert mine.own_db == pytest.approx(other.own_db, abs=1e-3)
    text = page_text(fast, inputs=X)
    assert "Generated" in text and 'extern \\"C\\" void run(' in text


def test_a_function_that_is_no_module_is_drawn_too() -> None:
    model = Net().eval()

    @torch.no_grad()
    def twice(x: Tensor) -> Tensor:
        return model(x) * 2.0

    fast = torch.compile(twice, backend="bitfold", options={"recipe": "int8", "target": "cpu"})
    found = known(subject(fast, X[0]))
    assert [kernel.spec for kernel in found.kernels.values()] == [
        "linear 96x64 f32 int8 bias -> relu(y0)",
        "linear 64x96 f32 int8 bias -> mul(y0,2.0)",
    ]
    with pytest.raises(BitfoldError, match="not a function"):
        subject(torch.compile(twice, backend="eager"), X)


def test_a_compiled_function_on_the_reference_target_has_no_kernels() -> None:
    options = {"recipe": "int4[g32]", "target": "reference"}
    drawn = subject(torch.compile(Net().eval(), backend="bitfold", options=options), X)
    assert [step.name for step in drawn.trace.steps] == LOWERED
    assert known(drawn).kernels == {} and drawn.errors["fused_down"].sqnr_db < 30


def test_of_several_graphs_the_largest_is_drawn() -> None:
    fast = torch.compile(Broken().eval(), backend="bitfold", options={"recipe": "int8", "target": "cpu"})
    drawn = subject(fast, X)
    assert drawn.graphs == 2
    assert [kernel.spec for kernel in known(drawn).kernels.values()] == ["linear 64x96 f32 int8 bias"]
    assert "the largest of 2 graphs" in page_text(fast, inputs=X)


def test_a_trace_has_its_kernels_while_its_graph_lives_and_stays_as_it_is() -> None:
    gm = capture(Net().eval(), X)
    trace = Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=cpu}").run(gm)
    drawn = subject(trace)
    assert [step.name for step in drawn.trace.steps] == LOWERED and len(trace.steps) == 5
    assert len(known(drawn).kernels) == 2 and known(drawn).roof is None
    kept = pickle.loads(pickle.dumps(trace))
    assert subject(kept).inspection is None, "in another process nothing but the trace is left"


def test_a_trace_lowered_on_paper_shows_what_a_gpu_would_run() -> None:
    import bitfold.tools.on_paper  # noqa: F401

    gm = capture(Net().eval().to(torch.bfloat16), (X[0].to(torch.bfloat16),))
    steps = 'annotate{recipe="int4[g32]"},fold,fuse,lower{target=cuda_on_paper}'
    found = known(subject(Pipeline.parse(steps).run(gm)))
    for kernel in found.kernels.values():
        assert kernel.language == "Triton" and kernel.facts["rows"] == 4
        assert int(kernel.facts["registers of a thread"]) > 16
    assert found.roof is not None and "H200" in found.roof.name


def test_a_trace_lowered_for_a_gpu_that_is_not_there_shows_reference_operators() -> None:
    """What would run is shown, not what was wished: tensors of a processor stay on reference operators."""
    gm = capture(Net().eval(), X)
    trace = Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=cuda}").run(gm)
    found = known(subject(trace))
    assert found.kernels == {} and found.roof is None
    assert any("the target cuda runs on cuda" in miss.reason for miss in found.trace.misses)


def test_what_cannot_be_drawn_is_said_in_a_sentence(tmp_path: Path) -> None:
    folded = quantize(Net().eval(), "int8")
    fast = torch.compile(Net().eval(), backend="bitfold", options={"recipe": "int8"})
    for thing, sentence in (
        (folded, "a module becomes a graph by calling it, so viz needs them"),
        (fast, "a compiled function is compiled for its inputs"),
        (3, "viz() draws a Trace"),
    ):
        with pytest.raises(BitfoldError) as error:
            viz(thing, tmp_path / "no.html")
        assert sentence in str(error.value)
    wrong = torch.randn(3, 5)
    gm = capture(Net().eval(), X)
    for thing, inputs, sentence in (
        (gm, (wrong,), "the graph does not run on these inputs: mat1 and mat2"),
        (gm, (), "the graph does not run on these inputs: "),
        (fast, (wrong,), "it cannot be called with these inputs: "),
        (Net(), 3, "inputs are what the model is called with, in order, such as (x,), not a int"),
    ):
        with pytest.raises(BitfoldError) as error:
            viz(thing, tmp_path / "no.html", inputs=inputs)
        assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "no.html").exists()
