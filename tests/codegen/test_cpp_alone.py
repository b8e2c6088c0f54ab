"""CPU kernels as programs of their own: NEON under an emulator, stopped where arithmetic is undefined.

Each of these compiles for several seconds, so they are slow tests; they need a cross compiler
(g++-aarch64-linux-gnu) and qemu-user. Other processors' kernels are under sanitizers in
`test_cpp_sanitized.py`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp.vectors import VECTORS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import conv_alone
from conv_cases import operands as operands_of_conv
from conv_cases import spec_of
from cpp_cases import expected, operands, pair
from kernel_alone import built, ran
from test_conv_values import CASES, compare

# With no library to say what it was: the program is killed.
FLAGS = ["-O2", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
TEXTS = [
    "int8", "int4[g64]", "int3[g64]", "uint4[g32,zero]", "mxfp4", "nf4[g64]", "float8_e4m3fn", "int4[tensor]",
    "int8[g128]",
    "nvfp4", "float6_e2m3[16x32,f32]", "int8 x int8", "int4[g64] x int8", "uint4[g64,zero] x int8",
    "int8[32x32] x int8[g32,f32]",
]  # fmt: skip


def check(program: Path, spec: GemmSpec, runner: tuple[str, ...] = ()) -> None:
    for m, turn in ((1, False), (2, False), (7, False), (1, True), (19, True)):
        if turn and spec.activation is not None and spec.activation.cols is not None:
            continue  # x with a scale for each block has no panels
        inputs = operands(spec, m, seed=m)
        want, bound = expected(spec, inputs)
        error = (ran(program, spec, inputs, turn=turn, runner=runner).double() - want).abs()
        assert (error <= bound).all(), (str(spec), m, turn, (error / bound).nan_to_num(0).max())


def cross() -> tuple[list[str], tuple[str, ...]]:
    """A compiler for ARM, and what runs its programs."""
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    return [compiler, "-static"], (emulator,)


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["neon", "neondot"])
@pytest.mark.parametrize("text", TEXTS)
def test_neon(text: str, vectors: str, tmp_path: Path) -> None:
    compiler, runner = cross()
    spec = pair(text)
    check(built(spec, VECTORS[vectors], tmp_path, compiler, FLAGS), spec, runner)


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["neon", "neondot"])
@pytest.mark.parametrize("case", [case for case in CASES if conv_alone.alone(spec_of(CASES[case][0]))])
def test_convolutions_on_neon(case: str, vectors: str, tmp_path: Path) -> None:
    """Their loops are plain C++, of which the compiler makes NEON."""
    compiler, runner = cross()
    text, shape = CASES[case]
    spec = spec_of(text)
    inputs = operands_of_conv(spec, shape)
    program = conv_alone.built(spec, VECTORS[vectors], tmp_path, compiler, FLAGS)
    compare(spec, inputs, conv_alone.ran(program, spec, inputs, runner))


def test_a_program_that_fails_is_told(tmp_path: Path) -> None:
    """Else a kernel that a sanitizer stops would pass: what it should write may lie there already."""
    spec = pair("int8")
    program = tmp_path / "kernel"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "result").write_bytes(torch.zeros(1, spec.n).numpy().tobytes())
    with pytest.raises(Exception, match="returned non-zero exit status 1"):
        ran(program, spec, operands(spec, 1, seed=0))
