"""The benchmarks of training on rounded numbers, small: every path from options to the summary's table."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = ["--tiny", "--steps", "2", "--batch", "2", "--windows", "2", "--calibration", "4", "--seeds", "2"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


def test_the_digits(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    qat = script("qat")
    run(qat, monkeypatch, "--seeds", "1", "--epochs", "2", "--validate", "--out", tmp_path)
    found = json.loads((tmp_path / "qat-digits.json").read_text())
    assert (tmp_path / "qat-digits.png").stat().st_size > 1000
    assert all(found["summary"][name]["converted_equal"] for name in qat.RECIPES)
    # Two epochs on 900 images: what training wins back of int2 is plain, and more than the seeds' spread.
    assert found["summary"]["int2"]["recovered"] > 0.3
    assert "| int2, trained | " in capsys.readouterr().out


def test_the_language_model(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = script("qat_lm")
    run(lm, monkeypatch, *SMALL, "--formats", "int2[g32];int4[g32] x int8", "--out", tmp_path)
    name = f"qat-lm-{'cpu' if not torch.cuda.is_available() else script('qat_report').card()}"
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").stat().st_size > 1000 and not found["failed"]
    for row in found["formats"].values():
        assert row["converted_equal"] and len(row["runs"]) == 2 and len(row["curves"][0]) == 2
        assert set(row["algorithms"]) == set(lm.ALGORITHMS)
    assert "| int4[g32] x int8 | " in capsys.readouterr().out


def test_the_rate_is_chosen_by_validation_and_late_runs_are_left_out(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = script("qat_lm")

    def trained(model: object, bench: object, seed: int, rate: float, save: object = None) -> dict[str, Any]:
        # The test text prefers the other rate.
        return {"judged": {"validation": rate, "test": -rate}, "seconds": 1.0, "curve": [rate, float(seed)]}

    monkeypatch.setattr(lm, "trained", trained)
    bench = argparse.Namespace(given=argparse.Namespace(rates=[2.0, 1.0, 3.0], seeds=3, until=1e12))
    runs, curves, rate = lm._seeds(bench, object)
    assert rate == 1.0 and curves == [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]] and len(runs) == 3
    bench.given.until = 0.0
    assert lm._seeds(bench, object)[1:] == ([[2.0, 0.0]], 2.0)


def test_the_summary(script: Any) -> None:
    lm = script("qat_lm")
    judged = lambda value: {"validation": value, "test": value}  # noqa: E731
    row = {"rounded": judged(12.0), "runs": [judged(10.5), judged(10.7)]}
    row["algorithms"] = {"clip": judged(11.0), "gptq": judged(11.5)}
    found = {"float": {"file": judged(10.0), "runs": [judged(11.0)]}, "formats": {"int4[g32]": row}}
    rows = lm.summary(found)
    assert rows["float"]["base"] == 10.0 and rows["int4[g32]"]["algorithm"] == "clip"
    assert rows["int4[g32]"]["recovered"] == pytest.approx(math.log(12 / 10.6) / math.log(1.2))
    assert (
        lm.table(rows).splitlines()[-1]
        == "| int4[g32] | 12.000 | 11.000 (`clip`) | 48% | 10.600 ± 0.100 | 68% |"
    )


def test_a_step_is_timed_for_every_way(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = script("qat_step")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)  # 40 s a way on a CPU
    options = ["--width", "256", "--sequence", "16", "--steps", "1", "--rounds", "1", "--blocks", "1"]
    run(step, monkeypatch, *options, "--out", tmp_path)
    (file,) = tmp_path.glob("qat-step-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["way"] for row in rows] == list(step.WAYS)
    assert not [row for row in rows if "absent" in row]
    assert "| int4[g32] lsq | " in capsys.readouterr().out


def test_a_trained_model_says_the_same_on_the_cpu_target(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lm, targets, parts = script("qat_lm"), script("qat_targets"), script("qat_lm_train")
    run(lm, monkeypatch, *SMALL, "--formats", "int4[g32]", "--no-algorithms", "--save", "--out", tmp_path)
    given = argparse.Namespace(prompts=2, steps=8)
    row = targets.compare(tmp_path / "qat-lm-int4.safetensors", parts.TINY, "cpu", given)
    assert row["within"] and 0 < row["allowed"] < 0.1
    assert all(one["tie"] for one in row["differences"])
