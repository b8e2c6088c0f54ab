"""Instructions of a CPU kernel's inner loop for one row of x, counted in the machine code.

In: formats. Out: instructions, weights and their ratio, for AVX2.

    python benchmarks/cpu_instructions.py int8 'int4[g64]' 'int4[g64] x int8'

The loop is the largest in the function for four rows of weights and one of x that holds products; a kernel is
compiled with the flags that bitfold gives the compiler. Needs `objdump`.
"""

from __future__ import annotations

import argparse
import re
import subprocess

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp.body import Body
from bitfold.codegen.cpp.build import library_of
from bitfold.codegen.cpp.source import ROWS
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.formats import format

PRODUCT = re.compile("fmadd|vpmaddubsw|vpmaddwd|vpdpbusd")


def loop(text: str) -> tuple[int, int]:
    """(instructions, weights) of one turn."""
    name, _, of_x = text.partition(" x ")
    activation = format(of_x) if of_x else None
    laid_out = cpu_layout(format(name), 4096, activation)
    assert laid_out is not None
    spec = GemmSpec(laid_out, 4096, 4096, "f32", activation=activation)
    path = library_of(spec, "avx2").path()
    told = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    body = next(part for part in told.split("\n\n") if f"tileILi{ROWS[1]}ELi1E" in part.split("\n")[0])
    lines = [re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(\S*)", line) for line in body.split("\n")]
    code = [(int(m[1], 16), m[2], m[3]) for m in lines if m]
    turns = []
    for at, op, target in code:
        if op.startswith("j") and re.fullmatch("[0-9a-f]+", target) and int(target, 16) <= at:
            inside = [step for step in code if int(target, 16) <= step[0] <= at]
            if any(PRODUCT.search(step[1]) for step in inside):
                turns.append(len(inside))
    return min(turns), ROWS[1] * Body(spec).walk.codes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formats", nargs="+")
    for text in parser.parse_args().formats:
        instructions, weights = loop(text)
        print(f"{text:20} {instructions:5} for {weights:5} weights: {instructions / weights:.2f} each")


if __name__ == "__main__":
    main()
