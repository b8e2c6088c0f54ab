"""Running a pipeline: order, verification, trace."""

import gc
import pickle
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from bitfold.formats.errors import BitfoldError
from bitfold.passes import (
    Miss,
    Pass,
    Pipeline,
    Stage,
    VerificationError,
    call,
    capture,
    replace,
    report,
    state,
)

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


@dataclass(frozen=True)
class ReluToGelu(Pass):
    name: ClassVar[str] = "relu_to_gelu"

    def apply(self, gm: GraphModule) -> int:
        found = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
        for node in found:
            replace(node, call(gm, aten.gelu.default, node.args, before=node, origin_from=node))
        return len(found)


@dataclass(frozen=True)
class Careless(Pass):
    name: ClassVar[str] = "careless"

    def apply(self, gm: GraphModule) -> int:
        for node in gm.graph.find_nodes(op="call_function", target=aten.relu.default):
            del node.meta["val"]
        return 1


@dataclass(frozen=True)
class Marks(Pass):
    name: ClassVar[str] = "marks"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.captured,)
    produces: ClassVar[Stage | None] = Stage.annotated
    ran: ClassVar[list[str]] = []

    def apply(self, gm: GraphModule) -> int:
        self.ran.append("marks")
        report(
            gm,
            next(iter(gm.graph.find_nodes(op="call_function", target=aten.relu.default))),
            Miss("no"),
            "gold",
        )
        return 0


@dataclass(frozen=True)
class Late(Pass):
    name: ClassVar[str] = "late"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.folded, Stage.fused)

    def apply(self, gm: GraphModule) -> int:
        return 0


def captured() -> GraphModule:
    torch.manual_seed(0)
    return capture(Net(), torch.zeros(2, 4), dynamic="batch")


def test_the_trace_shows_the_graph_after_each_pass() -> None:
    trace = Pipeline([ReluToGelu()]).run(captured())
    assert [step.name for step in trace.steps] == ["captured", "relu_to_gelu"]
    assert trace.steps[1].code.splitlines()[-2:] == [
        "gelu: f32[s77, 3] = aten.gelu.default(linear)",
        "return (gelu,)",
    ]
    change = trace.steps[1].changed
    assert (change.added, change.removed, change.altered) == (("gelu",), ("relu",), ("output",))
    gelu = trace.steps[1].snapshot.nodes[-2]
    assert gelu.made_from == ("relu",)
    assert gelu.source.startswith("test_pipeline_run.py:")
    assert gelu.text == "return torch.relu(self.fc(x))"
    assert (gelu.inputs, gelu.users, gelu.bytes) == (("linear",), ("output",), None)


def test_the_graph_runs_after_the_pipeline() -> None:
    gm, x = captured(), torch.randn(5, 4)
    expected = nn.functional.gelu(gm.fc.weight @ x.T + gm.fc.bias[:, None]).T
    Pipeline([ReluToGelu()]).run(gm)
    torch.testing.assert_close(gm(x), expected)


def test_a_broken_graph_names_pass_node_and_line() -> None:
    with pytest.raises(VerificationError) as error:
        Pipeline([ReluToGelu(), Careless()][1:]).run(captured())
    text = str(error.value)
    assert text.startswith("after careless: node 'relu' (test_pipeline_run.py:")
    assert text.endswith("it has no meta['val']")


def test_verification_can_be_left_out() -> None:
    Pipeline([Careless()]).run(captured(), verify=False)


def test_a_pass_that_comes_too_early_is_refused_before_anything_runs() -> None:
    Marks.ran.clear()
    with pytest.raises(
        BitfoldError, match="'late' takes a graph that is folded or fused, and this one is annotated"
    ):
        Pipeline([Marks(), Late()]).run(captured())
    assert Marks.ran == []


def test_a_pass_that_comes_twice_is_refused() -> None:
    gm = captured()
    Pipeline([Marks()]).run(gm)
    assert state(gm).stage is Stage.annotated
    with pytest.raises(BitfoldError, match=r"'marks' takes a graph that is captured, .* annotated already"):
        Pipeline([Marks()]).run(gm)


def test_misses_are_in_the_step_and_in_print() -> None:
    trace = Pipeline([ReluToGelu(), Marks()][1:]).run(captured())
    assert [miss.reason for miss in trace.misses] == ["no"]
    assert trace.steps[0].misses == ()
    assert "asked for and not given:\n  marks: relu (test_pipeline_run.py:" in str(trace)
    assert str(trace).endswith("gold: no")


def test_a_miss_is_told_once_also_over_two_runs() -> None:
    gm = captured()
    report(gm, gm.graph.output_node(), Miss("found at capture"))
    first = Pipeline([Marks()]).run(gm)
    assert [miss.reason for miss in first.steps[0].misses] == ["found at capture"]
    assert [miss.reason for miss in first.steps[1].misses] == ["no"]
    assert Pipeline([ReluToGelu()]).run(gm).misses == []


def test_the_table() -> None:
    lines = str(Pipeline([ReluToGelu()]).run(captured())).splitlines()
    assert lines[0].split() == ["pass", "rewrites", "nodes", "new", "gone", "altered", "time"]
    assert lines[2].split()[:6] == ["relu_to_gelu", "1", "6", "1", "1", "1"]


def test_progress_is_told_before_each_pass() -> None:
    told: list[tuple[str, int, int]] = []
    Pipeline([ReluToGelu(), Marks()][:1]).run(captured(), progress=lambda *what: told.append(what))
    assert told == [("relu_to_gelu", 0, 1)]


def test_a_trace_keeps_no_weight_alive() -> None:
    gm = captured()
    weight = weakref.ref(gm.fc.weight)
    trace = Pipeline([ReluToGelu()]).run(gm)
    assert trace.gm is gm
    del gm
    gc.collect()
    assert trace.gm is None
    assert weight() is None
    again = pickle.loads(pickle.dumps(trace))
    assert again.steps == trace.steps


def test_a_trace_s_repr_is_one_short_line() -> None:
    trace = Pipeline.parse(",".join(["annotate{recipe=int4[g4]}", *["eliminate_dead"] * 9])).run(
        capture(Net(), torch.zeros(2, 4))
    )
    assert repr(trace).startswith("<Trace of annotate{recipe=int4[g4]},eliminate_dead,")
    assert repr(trace).endswith(" s, 0 missed>") and len(repr(trace)) < 130


def test_a_pipeline_runs_on_a_graph() -> None:
    with pytest.raises(BitfoldError, match="runs on a graph, not on a Net; capture"):
        Pipeline.parse("normalize").run(Net())  # type: ignore[arg-type]
