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

SMALL = [
    "--tiny",
    "--steps",
    "2",
    "--base-steps",
    "2",
    "--batch",
    "2",
    "--windows",
    "2",
    "--calibration",
    "4",
    "--seeds",
    "2",
]


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


def test_images_of_a_folder(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files in MNIST's format: bright squares in one of ten places."""
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 600), ("t10k", 100)):
        labels = torch.arange(count) % 10
        images = torch.randint(60, (count, 28, 28), generator=draw)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[5 * (label // 5) : 5 * (label // 5) + 5, 5 * (label % 5) : 5 * (label % 5) + 5] += 150
        for name, part in (("images-idx3", images), ("labels-idx1", labels)):
            head = torch.tensor([0x800 + part.ndim, *part.shape]).to(torch.int32)
            raw = head.numpy().astype(">u4").tobytes() + part.to(torch.uint8).numpy().tobytes()
            (tmp_path / f"{split}-{name}-ubyte").write_bytes(raw)
    qat = script("qat")
    data = qat.mnist(tmp_path)
    assert data.images.shape == (600, 1, 28, 28) and data.held_labels.tolist()[:3] == [0, 1, 2]
    assert float(data.images.min()) == -1.0 and len(qat.validation(data).held) == 60
    run(qat, monkeypatch, "--mnist", tmp_path, "--seeds", "1", "--epochs", "2", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "qat-mnist.json").read_text())
    assert all(found["summary"][name]["converted_equal"] for name in qat.RECIPES)
    assert (tmp_path / "out" / "qat-mnist.png").stat().st_size > 1000
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0" * 20)
    with pytest.raises(SystemExit, match="t10k-labels-idx1-ubyte is no idx file"):
        qat.mnist(tmp_path)


def test_the_language_model(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = script("qat_lm")
    run(
        lm,
        monkeypatch,
        *SMALL,
        "--formats",
        "int2[g32];int4[g32] x int8",
        "--rates",
        "1e-4,1e-3",
        "--out",
        tmp_path,
    )
    name = f"qat-lm-{'cpu' if not torch.cuda.is_available() else script('qat_report').device_word()}"
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").stat().st_size > 1000 and not found["failed"]
    assert len(found["float"]["runs"]) == 2 and found["float"]["tried"]
    for row in found["formats"].values():
        assert row["converted_equal"] and [run["seed"] for run in row["runs"]] == [0, 1]
        assert [len(run["curve"]) for run in row["runs"]] == [2, 2] and len(row["tried"]) == 2
        assert set(row["algorithms"]) == set(lm.ALGORITHMS) and set(row["longer_rounded"]) == {"0", "1"}
    assert "| int4[g32] x int8 | " in capsys.readouterr().out


def test_every_run_begins_at_the_same_weights_with_a_fresh_optimizer(script: Any, tmp_path: Path) -> None:
    lm, parts, step = script("qat_lm"), script("qat_lm_train"), script("qat_lm_step")
    given = argparse.Namespace(tiny=True, windows=2, batch=2, model="", base=tmp_path / "none")
    given.scale_rate, given.compile, given.capture = 0.1, False, False
    bench = parts.Bench(given)
    model = lm.bf.prepare_qat(bench.floats(), "int4[g32]", lm.bf.Qat("lsq"))
    steps = step.Steps(model, bench.model, bench)
    first = steps.run(seed=0, rate=1e-3, steps=3)
    other = steps.run(seed=1, rate=1e-2, steps=4)
    assert steps.run(seed=0, rate=1e-3, steps=3, task=0.5) != first
    assert first == steps.run(seed=0, rate=1e-3, steps=3) and first[0] != other[0] and len(other) == 4


def test_the_rate_is_chosen_by_validation_and_late_runs_are_left_out(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = script("qat_lm")

    def trained(
        steps: object, bench: object, seed: int, rate: float, count: int, task: float
    ) -> dict[str, Any]:
        judged = {"validation": rate, "test": -rate}  # the test text prefers the other rate
        return {
            "seed": seed,
            "rate": rate,
            "task": task,
            "judged": judged,
            "equal": True,
            "curve": [],
            "model": None,
        }

    monkeypatch.setattr(lm, "trained", trained)
    ready = argparse.Namespace(compiled="no", captured="no")
    monkeypatch.setattr(lm, "Steps", lambda *args: ready)
    bench = argparse.Namespace(
        given=argparse.Namespace(seeds=3, until=1e12, steps=1, tasks=[0.0]), model=None
    )
    told: list[Any] = []
    run = lambda: lm._seeds(bench, torch.nn.Linear(1, 1), (2.0, 1.0, 3.0), lambda row: told.append(dict(row)))  # noqa: E731
    run()
    order = [[(one["seed"], one["rate"]) for one in row["runs"]] for row in told]
    assert order[:3] == [[(0, 2.0)], [(0, 1.0)], [(0, 1.0)]]
    assert order[3:] == [[(0, 1.0), (1, 1.0)], [(0, 1.0), (1, 1.0), (2, 1.0)]]
    bench.given.until = 0.0
    told.clear()
    run()
    assert [row["runs"][0]["rate"] for row in told] == [2.0]


def test_the_summary(script: Any) -> None:
    table = script("qat_lm_table")
    judged = lambda value: {"validation": value, "test": value, "divergence": 0.1}  # noqa: E731
    runs = lambda *values: [{"judged": judged(value), "rate": 1.0} for value in values]  # noqa: E731
    row = {"rounded": judged(12.0), "runs": runs(10.5, 10.7)}
    row["algorithms"] = {"clip": judged(11.0), "gptq": judged(11.5)}
    floats = {"file": judged(10.5), "base": judged(10.0), "runs": runs(9.4, 9.6)}
    rows = table.summary({"float": floats, "formats": {"int4[g32]": row}})
    assert rows["float"] == {"file": 10.5, "base": 10.0, "longer": [9.5, pytest.approx(0.1)]}
    assert rows["int4[g32]"]["algorithm"] == "clip"
    assert rows["int4[g32]"]["recovered"] == pytest.approx(math.log(12 / 10.6) / math.log(1.2))
    assert rows["int4[g32]"]["recovered_strictly"] == pytest.approx(math.log(12 / 10.6) / math.log(12 / 9.5))
    text = table.table(rows)
    assert text.startswith("Float: file 10.500, base 10.000, longer 9.500.")
    assert text.endswith("| int4[g32] | 12.000 | 11.000 (`clip`) | 48% | 10.600 ± 0.100 | 68% | 53% |  |")
    assert table.table(table.summary({"float": {}, "formats": {}})) == ""


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
    assert all(one["within"] and 0 < one["allowed"] < 1e-3 for one in row["logits"])
    assert not row["not_taken"] + row["said"]
    assert all(one["tie"] for one in row["differences"])
