"""Recording: a trace without graphs costs nothing, one with them little, and both say the same of the
passes."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.formats.errors import BitfoldError
from bitfold.lowering import Pipeline
from bitfold.passes import pipeline as pipeline_module
from bitfold.passes.graph_snapshot import Recorder, snapshot
from bitfold.passes.scopes.program import capture
from bitfold.tools.viz import viz

STEPS = Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=reference}")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.up, self.down = (
            nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + torch.softmax(self.q(h) @ self.k(h).transpose(-1, -2), -1) @ self.v(h)
        return x + self.down(torch.relu(self.up(x)))


def captured(width: int = 64, layers: int = 3) -> GraphModule:
    torch.manual_seed(0)
    with torch.no_grad():
        return capture(
            nn.Sequential(*(Block(width) for _ in range(layers))).eval(), (torch.randn(1, 8, width),)
        )


def test_without_recording_nothing_of_the_graph_is_looked_at(monkeypatch) -> None:
    def looked(*_: object) -> None:
        raise AssertionError("a snapshot was taken")

    monkeypatch.setattr(Recorder, "snapshot", looked)
    trace = STEPS.run(captured(), record=False)
    assert [step.name for step in trace.steps] == ["captured", "annotate", "fold", "fuse", "lower"]
    assert not trace.recorded and all(len(step.snapshot) == 0 for step in trace.steps)


def test_torch_compile_records_only_for_who_asks(monkeypatch) -> None:
    taken = []
    real = Recorder.snapshot
    monkeypatch.setattr(Recorder, "snapshot", lambda self, gm: taken.append(1) or real(self, gm))
    options = {"recipe": "int8", "target": "reference"}
    for trace, expected in ((None, 0), ([], 5)):
        torch._dynamo.reset()
        given = options if trace is None else {**options, "trace": trace}
        with torch.inference_mode():
            torch.compile(Block(64).eval(), backend="bitfold", options=given)(torch.randn(1, 8, 64))
        assert len(taken) == expected


def test_with_and_without_the_passes_do_the_same() -> None:
    graphs = captured(), captured()
    on, off = STEPS.run(graphs[0]), STEPS.run(graphs[1], record=False)
    assert str(snapshot(graphs[0])) == str(snapshot(graphs[1]))
    assert [(s.name, s.rewrites, s.misses) for s in on.steps] == [
        (s.name, s.rewrites, s.misses) for s in off.steps
    ]


def test_a_trace_without_graphs_is_not_drawn(tmp_path) -> None:
    trace = STEPS.run(captured(), record=False)
    with pytest.raises(BitfoldError, match="holds no graphs: run the pipeline with record=True"):
        viz(trace, tmp_path / "a.html")


def test_recording_takes_less_than_a_seventh_of_the_pipelines_time() -> None:
    """15 %, of processor time (other processes count for nothing), the fastest run of several of each kind,
    taken in turns; three rounds, since even processor time has its accidents."""
    assert pipeline_module.Recorder is Recorder

    def seconds(record: bool) -> float:
        gm = captured(256, 12)
        began = time.process_time()
        STEPS.run(gm, record=record)
        return time.process_time() - began

    shares = []
    for _ in range(3):
        times = {True: [], False: []}
        for _ in range(4):
            for record, found in times.items():
                found.append(seconds(record))
        shares.append(1 - min(times[False]) / min(times[True]))
        if shares[-1] < 0.15:
            return
    pytest.fail(f"recording took {shares} of the pipeline's time")
