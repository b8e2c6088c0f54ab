"""`bitfold tune`: what it would try, one sentence without a GPU, and the table it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from bitfold.tools.cli import main
from bitfold.tools.commands import tune_command

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 64)).bfloat16(), torch.randn(4, 256)
"""


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]):
    def run(*words: str) -> tuple[int, str, str]:
        status = main(["tune", *words])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_without_a_gpu_one_sentence(told) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    status, out, err = told("4096x4096", "--recipe", "int4")
    assert (status, out) == (2, "")
    assert err == (
        "bitfold: tuning measures kernels on a CUDA GPU, and there is none here; --show says what would be "
        "tried\n"
    )


def test_what_would_be_tried_for_a_shape(told) -> None:
    status, out, _ = told(
        "4096x4096", "512x1024", "--recipe", "int4", "--ms", "1", "64", "--show", "--top", "3"
    )
    lines = out.splitlines()
    assert status == 0 and len(lines) == 4
    assert lines[0].startswith("linear 4096x4096 bf16 int4[g128,halves256], M = 1: m8 n64 w2 s3 k4 sum; m")
    assert lines[3].startswith("linear 512x1024 bf16 int4[g128,halves256], M = 64: ")
    # Beside the three the library, and what is pipelined where there is a Hopper GPU.
    assert all("; tma " not in line and line.count("; ") == 2 for line in lines[::2])
    assert all(line.count("; ") >= 3 and line.endswith("; library") for line in lines[1::2])


def test_what_would_be_tried_for_a_model(told, tmp_path: Path) -> None:
    """A layer whose rows no group divides stays as it was, and has no kernel."""
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    status, out, _ = told(f"{file}:build", "--recipe", "int8", "--ms", "1", "--show", "--dtype", "f16")
    assert status == 0
    assert [line.partition(",")[0] for line in out.splitlines()] == [
        "linear 96x256 f16 int8[halves128]",
        "linear 64x96 f16 int8[halves32]",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0x4096", "--recipe", "int4"], "there is no model '0x4096'"),
        (["4096x4096", "--recipe", "int5x"], "int5x"),
        (["4096x4096", "--recipe", "stored"], "gives a linear of 4096x4096 no format to be stored in"),
        (
            ["4096x100", "--recipe", "int4"],
            "leaves nothing there for a kernel to multiply with|does not divide",
        ),
    ],
)
def test_mistakes_are_one_sentence(told, words: list[str], said: str) -> None:
    status, _, err = told(*words, "--show")
    assert status == 2 and err.count("\n") == 1
    assert any(one in err for one in said.split("|")), err


@pytest.mark.parametrize("words", [["--ms", "0"], ["--seconds", "-1"], ["--dtype", "f32"]])
def test_options_that_make_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "64x64", "--recipe", "int8", *words])
    assert words[0] in capsys.readouterr().err


def test_the_table_says_what_was_gained(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"spec": "linear 64x64 bf16 int8[halves64]", "m": 1, "schedule": "first", "us": 3.0},
        {"spec": "linear 64x64 bf16 int8[halves64]", "m": 1, "schedule": "second", "us": 2.0},
        {"spec": "linear 64x64 bf16 int8[halves64]", "m": 1, "schedule": "third", "failed": "no"},
    ]
    Console(width=200).print(tune_command.table(rows))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["kernel", "M", "us", "untuned", "schedule"],
        ["linear", "64x64", "bf16", "int8[halves64]", "1", "2.0", "3.0", "second"],
    ]
