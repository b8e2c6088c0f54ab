"""explain, viz and plot as commands; the served page; the profile for Perfetto; plots as PNG."""

from __future__ import annotations

import io
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from small_models import Net

from bitfold.formats.errors import BitfoldError
from bitfold.lowering import Pipeline
from bitfold.tools.chrome import export, with_provenance
from bitfold.tools.cli import main
from bitfold.tools.inspection import Inspection, inspect
from bitfold.tools.pareto import Point
from bitfold.tools.serve import server
from bitfold.tools.text_file import write_text

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def build():
    torch.manual_seed(0)
    return Net(), torch.randn(4, 64)
"""
X = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)),)


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    return f"{file}:build"


@pytest.fixture(scope="module")
def found() -> Inspection:
    steps = Pipeline.parse("annotate{recipe=int8},fold,fuse,lower{target=cpu}")
    return inspect(Net().eval(), steps, X, runs=1)


def test_explain_prints_the_tree_and_writes_the_page(model, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    assert main(["explain", model, "--recipe", "int8", "--html", str(page)]) == 0
    told = capsys.readouterr().out
    for fact in (
        "Everything that was asked for was done",
        "up",
        "int8",
        "8.50",
        "cpu",
        "C++",
        "dB",
        "%",
        "weights 0.0",
    ):
        assert fact in told, fact
    assert page.read_text().startswith("<!doctype html>")


def test_explain_shows_a_gpus_kernels_without_one(model, capsys) -> None:
    given = ["explain", model, "--recipe", "int4[g32]", "--target", "cuda_on_paper"]
    assert main([*given, "--dtype", "bf16"]) == 0
    assert "Triton m8 n64" in " ".join(capsys.readouterr().out.split())
    assert main(given) == 2
    assert "a GPU's kernels take bfloat16 or float16: add --dtype bf16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["explain"], "say what to do to the model: --recipe RECIPE or --pipeline TEXT"),
        (["explain", "--recipe", "int8", "--recipe", "int4"], "explain takes one recipe or pipeline"),
        (["explain", "--recipe", "int9"], "int9"),
        (["explain", "--recipe", "int8", "--runs", "-1"], "--runs is a number of calls, not -1"),
        (["explain", "--recipe", "int8_static"], "finds ranges by calibration"),
        (["viz", "--recipe", "int8"], "say where the page goes: -o PAGE, or --serve"),
        (["viz", "--recipe", "a", "--recipe", "b", "--recipe", "c", "-o", "x.html"], "at most two"),
        (["viz", "--recipe", "int8", "-o", "no/such/x.html"], "there is no folder"),
        (["plot", "--recipe", "int8"], "say what to draw"),
        (["plot", "--recipe", "int8", "--pareto", "x.png"], "give two or more"),
        (["plot", "--recipe", "int8", "--chrome", "no/such/x.json"], "there is no folder"),
    ],
)
def test_mistakes_get_one_sentence(model, capsys, given: list[str], sentence: str) -> None:
    assert main([given[0], model, *given[1:]]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1


def test_viz_writes_one_page_or_two_traces_in_one(model, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    given = ["viz", model, "--recipe", "int8", "--recipe", "int4[g32]", "--runs", "0", "-o", str(page)]
    assert main(given) == 0
    assert f"{page} shows it" in capsys.readouterr().out
    data = json.loads(
        page.read_text().split('<script id="data" type="application/json">')[1].split("</script>")[0]
    )
    assert data["title"] == "annotate, fold, fuse, lower" and "int4[g32]" in data["other"]["title"]


def test_a_link_stays_and_what_it_points_to_is_new(tmp_path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "page.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    assert write_text(link, "new") == link
    assert link.is_symlink() and target.read_text() == "new"
    assert [one.name for one in target.parent.iterdir()] == ["page.html"]


def test_the_served_page_is_made_anew_when_the_file_changes(tmp_path) -> None:
    file, made = tmp_path / "mine.py", []
    file.write_text("1")

    def make() -> str:
        made.append(1)
        if len(made) == 3:
            raise BitfoldError("<b>boom</b>")
        if len(made) == 4:
            raise RuntimeError("<i>half written</i>")
        return f"page {len(made)}" + "\ud800" * (len(made) == 5)

    with server(make, 0, file) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_address[1]}"
        get = lambda path="/": urllib.request.urlopen(url + path, timeout=20).read().decode()  # noqa: E731
        assert (get(), get("/index.html?x=1"), get()) == ("page 1",) * 3
        os.utime(file, (1, 1))
        assert get() == "page 2"
        os.utime(file, (2, 2))
        assert "&lt;b&gt;boom&lt;/b&gt;" in get()
        os.utime(file, (3, 3))
        assert "RuntimeError: &lt;i&gt;half written" in get()
        os.utime(file, (4, 4))
        assert get() == r"page 5\ud800"  # a name that UTF-8 has no bytes for
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("/etc/passwd")
        with pytest.raises(BitfoldError, match="cannot be listened on"):
            server(make, running.server_address[1], None)
        running.shutdown()


def test_the_profile_says_where_every_operator_is_from(found, tmp_path) -> None:
    events = json.loads(export(found, X, tmp_path / "trace.json").read_text())["traceEvents"]
    ours = [e for e in events if e.get("name") == "bitfold::fused" and e.get("cat") == "cpu_op"]
    assert [e["args"]["bitfold"]["module"] for e in ours] == ["up", "down"]
    told = ours[0]["args"]["bitfold"]
    assert told["pass"] == "finish" and told["target"] == "cpu, C++"
    assert told["kernel"] == "linear 96x64 f32 int8 bias -> relu(y0)"
    assert told["source"].startswith("small_models.py:") and "self.up(x)" in told["source"]
    spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "module"]
    assert [name for name, _, _ in spans] == ["up", "down"] and spans[0][2] <= spans[1][1]
    for event, (_, began, ended) in zip(ours, spans, strict=True):
        assert began <= event["ts"] and event["ts"] + event["dur"] <= ended + 1


def test_a_gpus_kernel_is_told_by_the_operator_that_launched_it() -> None:
    def event(name: str, cat: str, ts: float, dur: float, tid: int, **args: int) -> dict:
        return {"ph": "X", "name": name, "cat": cat, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}

    given = [
        event("bitfold node a", "user_annotation", 0, 10, 1),
        event("bitfold::fused", "cpu_op", 1, 8, 1, **{"External id": 7}),
        event("cudaLaunchKernel", "cuda_runtime", 2, 1, 1, correlation=99),
        event("kernel_x", "kernel", 50, 5, 7, correlation=99),
        event("kernel_y", "kernel", 60, 5, 7, **{"External id": 7}),
        event("kernel_z", "kernel", 70, 5, 7, correlation=5),
        event("elsewhere", "cpu_op", 30, 1, 1),
    ]
    told = {
        e["name"]: e.get("args", {}).get("bitfold")
        for e in with_provenance(given, {"a": {"node": "a", "module": "m.n"}})
    }
    assert told["kernel_x"] == told["kernel_y"] == told["bitfold::fused"] == {"node": "a", "module": "m.n"}
    assert told["kernel_z"] is None and told["elsewhere"] is None


def test_plots_are_pictures(found, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="NO MATPLOTLIB: plots as PNG are not tested")
    from bitfold.tools.plots import pareto, roofline

    points = (Point("$int4[g64]$", 4.25, 20.0, 1e-3, True), Point("int8", 8.1, 40.0, 2e-3, True))
    for path in (roofline(found, tmp_path / "roof.png"), pareto(points, tmp_path / "pareto.png")):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and 5_000 < len(data) < 300_000
    with pytest.raises(BitfoldError, match="recipes are compared from two on"):
        pareto(points[:1], tmp_path / "x.png")
    untimed = inspect(Net().eval(), Pipeline.parse("annotate{recipe=int8},fold,fuse"), X, runs=0)
    with pytest.raises(BitfoldError, match="no timed kernel to draw"):
        roofline(untimed, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib_one_sentence_says_what_to_install(found, tmp_path, monkeypatch) -> None:
    from bitfold.tools.plots import roofline

    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(BitfoldError, match=r"pip install 'bitfold\[plots\]'"):
        roofline(found, tmp_path / "roof.png")


def test_the_terminal_gets_plain_text_where_it_is_no_terminal(found) -> None:
    from rich.console import Console

    from bitfold.tools.explain import explain
    from bitfold.tools.explain.show import show

    out = io.StringIO()
    show(explain(found), Console(file=out, width=100))
    assert "\x1b[" not in out.getvalue()
