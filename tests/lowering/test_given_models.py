"""What is given as a model and is none, or is one already; and one trace at a time."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitfold as bf
from bitfold.lowering.tracing import TRACING

X = torch.randn(2, 32)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


NO_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "dict": (dict, r"takes a torch\.nn\.Module, not a dict$"),
    "exported": (
        lambda: torch.export.export(model(), (X,)),
        "not a ExportedProgram; give the model that torch.exp",
    ),
    "scripted": (
        lambda: torch.jit.script(model()),
        "cannot look into a RecursiveScriptModule; give the model that",
    ),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_no_models(case: str, tmp_path: Path) -> None:
    make, message = NO_MODELS[case]
    given = make()
    with pytest.raises(bf.BitfoldError, match=r"bf\.quantize .*" + message):
        bf.quantize(given, "int8")
    with pytest.raises(bf.BitfoldError, match=r"bf\.save .*" + message):
        bf.save(given, tmp_path / "m")
    bf.save(bf.quantize(model(), "int8"), tmp_path / "m")
    with pytest.raises(bf.BitfoldError, match=r"bf\.load\(path, into=\.\.\.\) .*" + message):
        bf.load(tmp_path / "m", into=given)


def test_captured_graphs(tmp_path: Path) -> None:
    graph = bf.capture(model(), (X,))
    for given in (graph, torch.export.export(model(), (X,)).module()):
        with pytest.raises(
            bf.BitfoldError, match=r"found no module .* call bf\.quantize\(graph, .*scope='program'"
        ):
            bf.quantize(given, "int8")
    program = bf.quantize(graph, "int8", scope="program", example_inputs=(X,), target="reference")
    assert bf.report(program).layers
    for scope in ("module", "program"):
        with pytest.raises(bf.BitfoldError, match="this program is quantized already"):
            bf.quantize(program, "int8", scope=scope, example_inputs=(X,))
    # A graph of modules is a model like others.
    traced = bf.quantize(torch.fx.symbolic_trace(model()), "int8", target="reference")
    assert [layer.path for layer in bf.report(traced).layers] == ["0", "2"]
    bf.save(traced, tmp_path / "m")
    assert torch.equal(bf.load(tmp_path / "m", into=model(), target="reference")(X), traced(X))


def test_a_compiled_model_is_quantized_inside_and_saved_without_its_wrapper(tmp_path: Path) -> None:
    compiled = torch.compile(model(), backend="eager")
    before = compiled(X)
    recipe = bf.Recipe("mine", (bf.Rule("0", weight="int8"),))
    assert bf.quantize(compiled, recipe, target="reference") is compiled
    assert [layer.path for layer in bf.report(compiled).layers] == ["0"]
    expected = compiled._orig_mod(X)
    assert torch.equal(compiled(X), expected) and not torch.equal(before, expected)
    bf.save(compiled, tmp_path / "m")
    assert torch.equal(bf.load(tmp_path / "m", into=model(), target="reference")(X), expected)
    again = torch.compile(model(), backend="eager")
    assert torch.equal(bf.load(tmp_path / "m", into=again, target="reference")(X), expected)


def test_load_waits_for_a_trace(tmp_path: Path) -> None:
    bf.save(bf.quantize(model(), "int8"), tmp_path / "m")
    loading = threading.Thread(target=bf.load, args=(tmp_path / "m", model()))
    with TRACING:
        loading.start()
        loading.join(0.2)
        assert loading.is_alive()
    loading.join(60)
    assert not loading.is_alive()
