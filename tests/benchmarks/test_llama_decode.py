"""The decode benchmark without a GPU: its model, options and table, and two layers of it on this CPU."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_sizes_are_those_of_the_8b_model(script: Any) -> None:
    llama = script("llama")
    with torch.device("meta"):
        model = llama.Llama(llama.LLAMA_8B, 1)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_a_token_sees_what_came_before_it_and_nothing_else(script: Any) -> None:
    llama = script("llama")
    sizes = replace(llama.TINY, layers=1)
    model = llama.build(sizes, 2, "cpu").float()
    tokens = torch.randint(0, sizes.vocabulary, (2, 4))
    with torch.inference_mode():
        steps = [model(tokens[:, i : i + 1], torch.tensor([i])) for i in range(4)]
        again = model(tokens[:, 2:3], torch.tensor([2]))  # what stands behind it now is masked
        torch.testing.assert_close(again, steps[2])
        model.layers[0].attention.keys.zero_()
        assert not torch.allclose(model(tokens[:, 2:3], torch.tensor([2])), steps[2])


def test_options(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    decode = script("llama_decode")
    given = decode.options(["--tiny", "--layers", "2", "--variants", "bf16", "bitfold-int4[g64]"])
    assert decode.sizes(given).layers == 2 and decode.sizes(given).width == 256
    assert decode.command(given, "bf16", Path("o.json"))[2:6] == ["--one", "bf16", "--out", "o.json"]
    with pytest.raises(SystemExit):
        decode.options(["--variants", "int4"])
    assert "'int4' is no variant; there are bf16, bitfold-int4," in capsys.readouterr().err


def test_the_table(script: Any) -> None:
    decode = script("llama_decode")
    shared = {"batch": 1, "compile_s": 20.0, "memory": 16e9, "peak": 17e9, "error": 0.0}
    rows = [
        {**shared, "variant": "bf16", "ms": 6.0},
        {**shared, "variant": "bitfold-int4", "ms": 2.5, "memory": 5.5e9, "error": 0.2},
        {"variant": "torchao-int8", "batch": 1, "ms": None, "failed": "no kernel"},
    ]
    assert (
        decode.markdown({"rows": rows, "absent": {"torchao-fp8": "no module"}})
        == """\
| variant | batch | ms a token | against bf16 | compile s | GB | GB at most | error |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| bf16 | 1 | 6.000 | 1.00x | 20 | 16.00 | 17.00 | 0.000 |
| bitfold-int4 | 1 | 2.500 | 2.40x | 20 | 5.50 | 17.00 | 0.200 |
| torchao-int8 | 1 | - | - | - | - | - | - |

torchao-int8, batch 1: no kernel

absent: torchao-fp8: no module"""
    )


@pytest.mark.parametrize("name", ["bitfold-int4", "bitfold-int8_dynamic", "bitfold-int4_all+kv_int8"])
def test_ours_in_this_process(script: Any, name: str) -> None:
    """As the reference target runs them, without a compiler: what is quantized, and what the row says."""
    decode = script("llama_decode")
    words = ["--tiny", "--layers", "1", "--device", "cpu", "--target", "reference", "--one", name]
    row = decode.measure(decode.options([*words, "--steps", "1", "--repeats", "1"]), 1)
    torch.compiler.reset()
    assert "failed" not in row and row["ms"] > 0 and row["repeats"]
    # Against plain torch on the decoded weights: the same numbers, but for activations and caches in codes.
    assert row["error"] == 0.0 if name == "bitfold-int4" else 0.0 < row["error"] < 0.1
    sizes = decode.sizes(decode.options(words))
    whole = 2 * sum(p.numel() for p in script("llama").Llama(sizes, 1).parameters())
    assert row["weights"] < (0.9 if "all" in name else 0.97) * whole


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, out = script("llama_decode"), tmp_path / "out.json"
    words = ["--tiny", "--layers", "2", "--batches", "1", "--steps", "2", "--repeats", "1", "--device", "cpu"]
    words += ["--variants", "bf16", "bitfold-int4", "bitfold-int4+kv_int8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["llama_decode.py", *words])
    decode.main()
    found = json.loads(out.read_text())
    assert found["absent"] == {} and len(found["rows"]) == 3
    assert all(row["ms"] > 0 and row["repeats"] for row in found["rows"]), found["rows"]
    assert all(row["error"] < 0.02 for row in found["rows"][:2])
