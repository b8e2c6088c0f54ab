"""The command line: what each command prints, the files between commands, and one sentence a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitfold
from bitfold.tools.cli import main
from bitfold.tools.commands import formats_command

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)), torch.randn(4, 64)

def bare():
    return nn.Sequential(nn.Linear(64, 96))

def number():
    return 3

def several():
    return nn.Linear(4, 4), 1, 2

def boom():
    raise RuntimeError("kaboom")

def keywords():
    return nn.Linear(64, 4), {"input": torch.randn(2, 64)}

def misfit():
    return nn.Linear(64, 4), torch.randn(2, 63)

def mixed():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x):
            return {"out": self.fc(x), "mask": x > 0, "n": 3}

    return Mixed(), torch.randn(2, 64)
"""

FORMAT = """
from bitfold.formats import Codebook, register

register("cli_fifths", Codebook("cli_fifths", (0.0, 0.2, -0.2, 1.0, -1.0)))
"""

PASS = """
from dataclasses import dataclass
from typing import ClassVar
import torch
import bitfold as bf

@bf.register_pass
@dataclass(frozen=True)
class CliDoubleRelu(bf.Pass):
    name: ClassVar[str] = "cli_drop_relu"
    requires: ClassVar = None
    produces: ClassVar = None

    def apply(self, gm):
        found = [node for node in gm.graph.nodes if node.target is torch.ops.aten.relu.default]
        for node in found:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        return len(found)
"""

TARGET = """
import bitfold as bf

@bf.register_target
class CliTarget(bf.Target):
    name = "cli_target"

    def supports(self, region):
        return True

    def lower(self, region):
        return region
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"mine": MODEL, "fmt": FORMAT, "pas": PASS, "tgt": TARGET}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What the command printed: on stdout, or if it is to fail, its one line on stderr."""
    assert main(arguments) == status, capsys.readouterr()
    out, err = capsys.readouterr()
    if status == 0:
        return out
    assert out == "" and err.count("\n") == 1 and err.startswith("bitfold: ")
    return err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("formats", "quantize", "inspect", "diagnose", "run", "bench", "demo"):
        assert f"\n    {command} " in text
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "--plugin FILE.py" in capsys.readouterr().out


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    everything = said(capsys, "formats")
    assert all(name in everything for name in ("int4[g128]", "float8_e4m3fn", "mxfp4", "nf4", "ternary"))
    assert said(capsys, "formats", "int4[g128]") == (
        "int4[g128]\n"
        "  stands for   int4[g128,bf16] (affine integer)\n"
        "  scale        amax / 7.5\n"
        "  stored as    codes, scales; layout packed\n"
        "  a weight     4096x4096 takes 8.25 MiB, 7.8 times less than float32\n"
        "  codes        0 1 2 3 4 5 6 7 -8 -7 -6 -5 -4 -3 -2 -1\n\n"
    )


def test_quantize_inspect_and_run_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "quantize", "mine.py:build", "--recipe", "int4[g32]", "-o", "m.safetensors")
    assert "2 weights in int4[g32]" in text and "m.safetensors: 36.5 KiB became" in text
    text = said(capsys, "inspect", "m.safetensors")
    assert "a module saved by bitfold" in text
    assert [line.split()[:2] for line in text.splitlines() if "g32" in line] == [["int4[g32]", "2"]]
    ahead = said(capsys, "run", "mine.py:build", "--recipe", "int4[g32]")
    assert ahead.startswith("output 0 [4, 32]: signal to noise ")
    assert said(capsys, "run", "mine.py:build", "--load", "m.safetensors") == ahead


def test_quantize_a_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "quantize", "mine.py:build", "--recipe", "int8", "--scope", "program", "-o", "p.safetensors")
    text = said(capsys, "inspect", "p.safetensors")
    assert "a program saved by bitfold" in text
    assert [line.split()[:2] for line in text.splitlines() if "int8" in line] == [["int8", "2"]]


def test_inspect_a_pipeline(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "inspect", "mine.py:build", "--recipe", "int8", "--code", "--html", "page.html")
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["captured", "annotate", "fold", "fuse"]
    assert "self.fused_0(" in text
    assert (here / "page.html").read_text().startswith("<!")
    pipeline = "annotate{recipe=int8},fold,fuse,lower{target=reference}"
    assert "lower{target=reference}" in said(capsys, "inspect", "mine.py:build", "--pipeline", pipeline)


def test_diagnose_names_the_worst_first(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    out = said(capsys, "diagnose", "mine.py:build", "--recipe", "int2[g32]", "--worst", "1")
    assert out.count("int2[g32]") == 1
    assert "2 layers; the model's output:" in out and " dB" in out


def test_plugins_before_and_after_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A format, a pass and a target, one file each."""
    assert "codes        0 0.2 -0.2 1 -1" in said(capsys, "--plugin", "fmt.py", "formats", "cli_fifths")
    quantize = ("quantize", "mine.py:build", "--recipe", "cli_fifths[g32]", "-o", "m.safetensors")
    assert "2 weights in cli_fifths[g32]" in said(capsys, *quantize, "--plugin", "fmt.py")
    assert "cli_fifths[g32]" in said(capsys, "inspect", "m.safetensors", "--plugin", "fmt.py")
    pipeline = "cli_drop_relu,annotate{recipe=cli_fifths[g32]},fold"
    inspect = ("inspect", "mine.py:build", "--pipeline", pipeline, "--code")
    text = said(capsys, "--plugin", "fmt.py", *inspect, "--plugin", "pas.py")
    assert "relu" not in text.split("\n\n")[-1].replace("cli_drop_relu", "")
    run = ("run", "mine.py:build", "--load", "m.safetensors", "--target", "cli_target")
    assert "signal to noise" in said(capsys, *run, "--plugin", "tgt.py", "--plugin", "fmt.py")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "quantize mine.py:build --recipe int7x -o m",
            "unknown recipe or format 'int7x'; did you mean 'int8'",
        ),
        ("quantize mine.py:build --recipe int4[g48] -o m", "48"),
        ("quantize mine.py:number --recipe int8 -o m", "returned int; it must return an nn.Module"),
        ("quantize junk.gguf --recipe int8 -o m", "junk.gguf is truncated or is not a GGUF file (GGUF magic"),
        ("quantize folder --recipe int8 -o m", "transformers cannot read a language model from folder: "),
        ("quantize mine.py:several --recipe int8 -o m", "returned tuple; it must return an nn.Module, or a"),
        ("quantize mine.py:boom --recipe int8 -o m", "boom in mine.py failed: mine.py:19 `raise Run"),
        ("quantize mine.py:keywords --recipe int8 -o m", "returned inputs by keyword; give them in order"),
        ("quantize mine.py:boom --recipe int8 -o no/m", "no/m cannot be written: there is no folder no"),
        ("inspect mine.py:boom --recipe int8 --html no/m", "no/m cannot be written: there is no folder no"),
        ("run mine.py:misfit --recipe int8", "the model cannot be called on its inputs: "),
        ("demo --out mine.py", "mine.py cannot be made a folder: File exists"),
        ("quantize mine.py:none --recipe int8 -o m", "mine.py has no function 'none'"),
        ("quantize nothing --recipe int8 -o m", "there is no model 'nothing'; give smollm2"),
        ("quantize no.gguf --recipe int8 -o m", "there is no GGUF file at no.gguf"),
        (
            "quantize mine.py:bare --recipe int8 --scope program -o m",
            "let the function return (model, inputs)",
        ),
        ("run mine.py:build --recipe int8 --target cqu", "there is no target 'cqu'; did you mean 'cpu'"),
        ("run mine.py:build --recipe int8 --tokens 0", "--tokens is 0; it must be 1 or more"),
        ("run mine.py:build --load none.safetensors", "none.safetensors"),
        ("inspect mine.py:build", "say what to do to the model"),
        ("inspect mine.py:build --pipeline annotate{recipe=int8},flod", "did you mean 'fold'"),
        ("formats int4[g128 --plugin mine.py", "int4[g128"),
        ("formats --plugin missing.py", "there is no Python file 'missing.py' to import"),
        ("formats --plugin broken.py", "importing broken.py failed: ZeroDivisionError: division by zero"),
        (
            "quantize mine.py:boom --recipe int8_static -o m",
            "recipe 'int8_static' finds ranges by cal",
        ),
        ("bench mine.py:boom --recipe none --recipe fp8_static", "recipe 'fp8_static' finds ranges by cal"),
        ("run mine.py:boom --load none.safetensors", "none.safetensors"),
        ("demo --recipe int9x", "unknown recipe or format 'int9x'"),
        ("bench mine.py:build --recipe none --recipe int9x", "unknown recipe or format 'int9x'"),
    ],
)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str) -> None:
    (here / "broken.py").write_text("1 / 0\n")
    (here / "junk.gguf").write_text("This is no such file, whatever its name says.")
    (here / "folder").mkdir()
    (here / "folder" / "config.json").write_text("{}")
    assert sentence in said(capsys, *arguments.split(), status=2)
    assert not (here / "m").exists()


def test_a_device_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU here")
    for command in (["bench", "mine.py:boom", "--recipe", "none"], ["demo"]):
        assert "torch sees no CUDA GPU here" in said(capsys, *command, "--device", "cuda", status=2)
    assert not (here / "out").exists()


def test_warnings_are_one_line_each(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "mine.py:build", "--recipe", "int8", "--target", "cuda"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("bitfold: ") and "cuda" in line for line in lines)


def test_only_floats_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "run", "mine.py:mixed", "--recipe", "int8")
    assert text.startswith("output 0 [2, 4]: signal to noise ") and text.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"bitfold {bitfold.__version__}\n"


def test_a_full_disk_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "m.part")

    monkeypatch.setattr(formats_command, "run", full)
    assert main(["formats"]) == 1
    assert capsys.readouterr().err == "bitfold: m.part: No space left on device\n"


def test_arguments_that_do_not_parse(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["frobnicate"], ["demo", "--steps", "0"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        capsys.readouterr()


def test_bench_of_any_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "bench", "mine.py:build", "--recipe", "none", "--recipe", "int8", "--steps", "3")
    assert [line.split()[0] for line in text.splitlines()] == ["recipe", "none", "int8"]
