"""Instructions of CPU kernels for each weight, counted by valgrind: whole calls on one row of x, not loops.

In: formats, shapes. Out: instructions a weight, and with --out the numbers as JSON.

    python benchmarks/cpu_instructions.py int8 'int4[g64]' 'int4[g64] x int8' --shapes 4096x4096 1536x576

The kernel runs once and three times as a program of its own (`kernel_alone.py`), for AVX2, with the flags
that bitfold gives the compiler; the difference is two calls, without what makes x ready. Needs valgrind,
which knows no AVX-512.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from kernel_alone import built, ran

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp.library import LOOPS, STRICT
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.codegen.cpp.vectors import VECTORS
from bitfold.formats import format

FORMATS = [
    "int8", "int4[g64]", "uint4[g32,zero]", "int3[g64]", "int3[g128]", "mxfp4", "nvfp4", "nf4[g64]",
    "float8_e4m3fn",
]  # fmt: skip
COUNTED = re.compile(rb"Collected : (\d+)")


def counted(text: str, n: int, k: int, m: int) -> float:
    """Instructions for each weight of a product with m rows of x."""
    name, _, of_x = text.partition(" x ")
    activation = format(of_x) if of_x else None
    laid_out = cpu_layout(format(name), k, activation, vectors=VECTORS["avx2"])
    assert laid_out is not None, text
    spec = GemmSpec(laid_out, n, k, "f32", activation=activation)
    x = torch.randn(m, k)
    inputs = [x] if activation is None else list(activation.quantize(x).parts)
    inputs += laid_out.quantize(torch.randn(n, k)).parts
    with tempfile.TemporaryDirectory() as folder:
        program = built(spec, VECTORS["avx2"], Path(folder), flags=("-O3", *STRICT, *LOOPS))
        found = []
        for repeats in (1, 3):
            ran(program, spec, inputs, turn=None, repeats=repeats)
            command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program)]
            given = [str(program.with_name(name)) for name in ("call", "result")]
            told = subprocess.run([*command, *given], stderr=subprocess.PIPE, check=True).stderr
            match = COUNTED.search(told)
            assert match is not None, told
            found.append(int(match[1]))
    return (found[1] - found[0]) / 2 / (n * k)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formats", nargs="*", default=[*FORMATS, "int8 x int8", "int4[g64] x int8"])
    parser.add_argument("--shapes", nargs="+", default=["128x4096", "128x1536", "128x576"])
    parser.add_argument(
        "--ms",
        nargs="+",
        type=int,
        default=[1],
        help="rows of x; as panels from where the kernel wants them so",
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for text in given.formats:
        for shape in given.shapes:
            for m in given.ms:
                n, k = map(int, shape.split("x"))
                if k % (format(text.partition(" x ")[0]).cols or 1):
                    continue  # no whole groups
                each = counted(text, n, k, m)
                rows.append({"format": text, "n": n, "k": k, "m": m, "instructions": round(each, 4)})
                print(f"{text:18} {shape:10} M={m:<3} {each:6.3f} instructions a weight", flush=True)
    if given.out:
        given.out.write_text(json.dumps({"vectors": "avx2", "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
