"""The sweep of schedules without a GPU: what it tries and writes, and the table it makes of raw files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from bitfold.codegen import GemmSpec
from bitfold.codegen.choose import untuned
from bitfold.codegen.device import device
from bitfold.codegen.table import SHIPPED, Entry, Table

ROOT = Path(__file__).parents[2]
H200 = device("NVIDIA H200")
TEXT = "linear 4096x4096 bf16 int4[g128,halves256]"
BEST, SLOW = "m8 n32 w1 s4 k4 sum", "m8 n64 w4 s3 k8 sum"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("schedules")


def rule(m: int = 8) -> str:
    return str(untuned(GemmSpec.parse(TEXT), m, H200))


def raw(path: Path, rows: list[dict[str, Any]], card: str = "NVIDIA H200") -> Path:
    facts = {"format": "int4[g128,halves256]", "n": 4096, "k": 4096, "m": 1}
    path.write_text(json.dumps({"card": card, "rows": [facts | row for row in rows]}))
    return path


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_are_what_their_raw_files_say(script: Any, path: Path) -> None:
    held = Table.parse(path.read_text(encoding="utf-8"))
    assert script.shipped([ROOT / "benchmarks" / "results" / name for name in held.sources]) == held, (
        f"make it anew: python benchmarks/schedules.py --table {path.relative_to(ROOT)} --from "
        + " ".join(f"benchmarks/results/{name}" for name in held.sources)
    )


def test_the_best_row_becomes_an_entry(script: Any, tmp_path: Path) -> None:
    rows = [{"schedule": rule(), "us": 7.0}, {"schedule": BEST, "us": 6.0}, {"schedule": SLOW, "us": 8.0}]
    gemm = {"peer": "bitfold", "format": "int4[g128]", "schedule": "decode, then the library", "failed": None}
    peers = {"peer": "marlin", "format": "uint4", "us": 1.0, "failed": None}
    first = raw(tmp_path / "a.json", rows)
    second = raw(
        tmp_path / "b.json",
        [gemm | {"m": 1024, "us": 300.0}, peers, {"schedule": rule(1024), "m": 1024, "us": 460.0}],
    )
    found = script.shipped([first, second])
    assert found == Table(
        "NVIDIA H200", {TEXT: {8: Entry(BEST, 6.0), 1024: Entry("library", 300.0)}}, ("a.json", "b.json")
    )


@pytest.mark.parametrize(
    "rows",
    [
        [{"schedule": BEST, "us": 6.0}],  # what runs untuned may be faster
        [{"schedule": rule(1024), "m": 1024, "us": 460.0}],  # and so may the library
        [{"schedule": "m8 n64 w2 s3 k4 end", "us": 1.0}] * 12,  # cannot run
        [{"schedule": "m8", "us": 1.0}] * 12,
        [{"schedule": BEST, "us": 6.0, "format": "int4[g128,halves64]"}] * 12,  # no layout of today's
        [{"schedule": rule(), "failed": "error 1 is over 0.0039"}],
    ],
)  # fmt: skip
def test_rows_that_say_nothing_become_none(script: Any, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert script.shipped([raw(tmp_path / "a.json", rows)]).entries == {}


def test_files_of_several_cards_do_not_mix(script: Any, tmp_path: Path) -> None:
    files = [raw(tmp_path / "a.json", []), raw(tmp_path / "b.json", [], "NVIDIA B200")]
    with pytest.raises(SystemExit, match="of several cards: NVIDIA B200, NVIDIA H200"):
        script.shipped(files)


def test_what_is_tried_by_default(script: Any) -> None:
    wanted = script.wanted(script.options([]))
    assert len(wanted) == len(set(wanted)) == len(script.FORMATS) * len(script.SHAPES) * len(script.MS)
    only = script.wanted(script.options(["--specs", TEXT, "--ms", "1", "64"]))
    assert only == [(GemmSpec.parse(TEXT), 1), (GemmSpec.parse(TEXT), 64)]
    spans = script.options(["--formats", "int4[g128]", "--shapes", "64x4096", "--ms", "1", "--every-layout"])
    assert [str(spec.weight) for spec, _ in script.wanted(spans)] == [
        "int4[g128,halves64]", "int4[g128,halves128]", "int4[g128,halves256]", "int4[g128,halves512]",
    ]  # fmt: skip


def test_raw_files_are_read_as_they_are_written(script: Any, tmp_path: Path) -> None:
    rows = [{"format": "f", "n": 1, "k": 2, "spec": TEXT, "m": 1, "schedule": BEST, "us": 6.0}]
    held = {"card": "NVIDIA H200", "torch": "2.11", "rows": rows}
    script.write(tmp_path / "raw.json", held)
    assert json.loads((tmp_path / "raw.json").read_text()) == held
    assert script.rows_in(tmp_path / "raw.json") == (
        "NVIDIA H200", [{"spec": TEXT, "m": 1, "schedule": BEST, "us": 6.0}]
    )  # fmt: skip


def test_the_summary(script: Any) -> None:
    rows = [
        {"spec": TEXT, "m": 1, "schedule": rule(), "us": 7.0, "model_us": 6.5},
        {"spec": TEXT, "m": 1, "schedule": BEST, "us": 6.04, "model_us": 6.1},
        {"spec": TEXT, "m": 64, "schedule": "library", "us": 90.0, "model_us": None},
    ]
    assert script.shown(rows) == (
        f"      6.0 us  M=1     {TEXT}  {BEST}  (model 6.1)\n     90.0 us  M=64    {TEXT}  library"
    )


def test_a_table_from_raw_files_needs_a_place(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.options(["--from", "raw.json"])
    assert "say which file with --table" in capsys.readouterr().err
