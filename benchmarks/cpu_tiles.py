"""What operations on tiles of AMX cost on this machine: nanoseconds each, and cycles, as JSON.

In: nothing. Out: a table; with --out the numbers.

    python benchmarks/cpu_tiles.py --out tiles.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from cpu import processor

from bitfold.codegen.cpp.library import HEADERS
from bitfold.codegen.cpp.vectors import VECTORS

SOURCE = Path(__file__).with_suffix(".cpp")


def measured() -> dict[str, float]:
    """Nanoseconds of each operation; CalledProcessError where the system lets nobody use tiles."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "tiles"
        flags = [*VECTORS["amx"].flags, f"-I{HEADERS}", "-std=c++17", "-O3"]
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(program)], check=True)
        told = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(told)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = measured()
    for what, each in found.items():
        print(f"{what:45} {each:9.2f} ns {each / found['cycle']:8.1f} cycles")
    if given.out:
        text = json.dumps({"machine": processor(), "ns": found}, indent=1) + "\n"
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
