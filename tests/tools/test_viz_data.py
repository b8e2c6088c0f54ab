"""The data behind the page: what each node became, what is written once, what is counted, what is escaped."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bitfold.formats.errors import BitfoldError
from bitfold.passes.annotate import Annotate
from bitfold.passes.core import state
from bitfold.passes.pipeline import Pipeline
from bitfold.passes.recipes import Recipe
from bitfold.passes.rules import Rule
from bitfold.passes.scopes.program import capture
from bitfold.passes.trace import Trace
from bitfold.tools.viz import viz
from bitfold.tools.viz.data import page_data
from bitfold.tools.viz.page import render


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def traced(pipeline: str, model: nn.Module | None = None) -> tuple[Trace, GraphModule]:
    gm = capture(model or Net().eval(), (torch.randn(4, 64),))
    return Pipeline.parse(pipeline).run(gm), gm


def became(data: dict, step: int) -> str:
    """A line a node of one step: what its box says, what it became, its format."""
    records = [data["records"][i] for i in data["steps"][step]["ids"]]
    return "\n".join(f"{r['label']}: {r['kind']} {r['format']}".rstrip() for r in records)


def test_what_nodes_become_in_each_stage() -> None:
    trace, gm = traced("annotate{recipe=int8_dynamic},fold,fuse")
    data = page_data(trace)
    assert [step["name"] for step in data["steps"]] == ["captured", "annotate", "fold", "fuse"]
    weights = "up.weight: parameter\ndown.weight: parameter\nx: input\n"
    assert became(data, 0) == weights + "linear: untouched\nrelu: untouched\nlinear: untouched\noutput: input"
    assert became(data, 1) == weights + "linear: annotated\nrelu: untouched\nlinear: annotated\noutput: input"
    activation = (
        "quantize: quantize int8\ngetitem: quantize\ngetitem: quantize\ndequantize: dequantize int8\n"
    )
    assert became(data, 2) == (
        f"x: input\n{activation}"
        "up_weight_codes: weight int8\nup_weight_scales: weight int8\ndequantize: dequantize int8\n"
        f"linear: compute\nrelu: untouched\n{activation}"
        "down_weight_codes: weight int8\ndown_weight_scales: weight int8\ndequantize: dequantize int8\n"
        "linear: compute\noutput: input"
    )
    # Codes stay codes when a region hides the operator that reads them.
    assert became(data, 3) == (
        "x: input\nup_weight_codes: weight int8\nup_weight_scales: weight int8\nfused: fused int8, int8\n"
        "down_weight_codes: weight int8\ndown_weight_scales: weight int8\nfused: fused int8, int8\n"
        "output: input"
    )
    assert set(data["regions"]) == {"fused_up", "fused_down"} and "aten.relu" in data["regions"]["fused_up"]
    assert gm is trace.gm


def test_observers_and_fake_quantize_are_seen() -> None:
    gm = capture(Net().eval(), (torch.randn(4, 64),))
    data = page_data(Pipeline.parse("annotate{recipe=int8_dynamic},fake_quantize").run(gm))
    assert re.search(r"fake_quantize\w*: observe", became(data, 2))


def test_in_the_frame_scope_a_placeholder_that_is_a_parameter_is_a_weight() -> None:
    gm = capture(Net().eval(), (torch.randn(4, 64),))
    state(gm).params["x"] = torch.zeros(4, 64)
    data = page_data(Pipeline(()).run(gm))
    assert "x: parameter" in became(data, 0)
    assert data["steps"][0]["weight_bytes"] == (4 * 64 + 64 * 64 + 64 * 32) * 4


def test_a_node_left_alone_is_written_once() -> None:
    trace, _ = traced("annotate{recipe=int8},fold")
    data = page_data(trace)
    relu = [[i for i in step["ids"] if data["records"][i]["name"] == "relu"] for step in data["steps"]]
    assert relu[0] == relu[1] == relu[2]
    assert len(data["records"]) == len({json.dumps(record) for record in data["records"]})
    fold = data["steps"][2]
    assert fold["removed"] == ["up_weight", "down_weight"] and fold["altered"] == ["linear", "linear_1"]


def test_bytes_of_weights_count_a_shared_constant_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=False)
            self.b = nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    trace, _ = traced("annotate{recipe=int8},fold", Tied().eval())
    bytes_ = [step["weight_bytes"] for step in page_data(trace)["steps"]]
    assert bytes_[0] == 64 * 64 * 4
    assert 64 * 64 < bytes_[2] <= 64 * 64 + 64 * 4


def test_a_miss_keeps_its_reason_and_stays_missed_in_later_stages() -> None:
    recipe = Recipe(
        "mixed", (Rule("up", weight="int4[g48]", on_misfit="report"), Rule("down", weight="int8"))
    )
    gm = capture(Net().eval(), (torch.randn(4, 64),))
    data = page_data(Pipeline((Annotate(recipe=recipe), *Pipeline.parse("fold").passes)).run(gm))
    (miss,) = data["steps"][1]["misses"]
    assert (miss["node"], miss["module"]) == ("linear", "up") and "48" in miss["reason"]
    assert ["linear: missed" in became(data, step) for step in range(3)] == [False, True, True]
    assert "1 missed" in data["summary"]


def test_hostile_names_are_only_data() -> None:
    trace, _ = traced("annotate{recipe=int8}")
    data = page_data(trace, title="</title><script>alert(1)</script> {{data}} \u2028 \ud800")
    data["records"][0]["module"] = "</script><img src=x onerror=alert(1)>"
    page = render(data)
    assert "<script>alert(1)" not in page and "<img" not in page
    assert page.count("</script>") == page.count("<script")
    held = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert held is not None
    again = json.loads(held.group(1))
    assert again["records"][0]["module"] == "</script><img src=x onerror=alert(1)>"
    assert again["title"].startswith("</title><script>alert(1)</script> {{data}}")


def test_the_page_carries_all_it_needs_and_the_licence_of_what_it_carries(tmp_path) -> None:
    trace, _ = traced("annotate{recipe=int8},fold")
    page = viz(trace, tmp_path / "trace.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page), "nothing is loaded from elsewhere"
    assert "default-src 'none'" in page
    assert "Permission is hereby granted, free of charge" in page and "Chris Pettitt" in page
    assert len(page) < 300_000


def test_mistakes_get_one_sentence(tmp_path) -> None:
    trace, gm = traced("annotate{recipe=int8}")
    with pytest.raises(BitfoldError, match=r"draws a Trace, .* not a list"):
        viz([gm], tmp_path / "a.html")
    with pytest.raises(BitfoldError, match="the trace is empty"):
        viz(Trace(), tmp_path / "a.html")
    with pytest.raises(BitfoldError, match=r"there is no folder .*no; make it first"):
        viz(trace, tmp_path / "no" / "a.html")
    with pytest.raises(BitfoldError, match="it is a folder"):
        viz(trace, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_page_appears_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    trace, _ = traced("annotate{recipe=int8}")
    page = viz(trace, tmp_path / "a.html", title="old \ud800")  # a file name may hold such a thing
    before = page.read_text(encoding="utf-8")
    assert "<title>old \\ud800</title>" in before

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        viz(trace, page, title="new")
    assert list(tmp_path.iterdir()) == [page] and page.read_text(encoding="utf-8") == before
