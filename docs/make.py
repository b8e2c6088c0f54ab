"""The parts of the documents that are made, not written: the table of formats and tables of results.

In: the formats themselves, and what the demo and benchmarks wrote to `benchmarks/results/`. Out:
`docs/formats.md`; README.md and the pages of docs/ with what stands between `<!-- table: NAME FILE -->` and
`<!-- end -->` made anew (`tables.py` has the names; FILE lies in `benchmarks/results/`).

    python docs/make.py            write them
    python docs/make.py --check    exit 1 and say so if one of them is stale (a test does this)
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from markdown_table import table
from tables import ROOT, result

from bitfold.formats.table import describe

DOCS = ROOT / "docs"
MADE = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = """# Formats

Made by `python docs/make.py` from the formats themselves; do not edit. Bits are per number, scales included.
Every element also takes the other granularities (`tensor`, `row`, `g32`, `128x128`), scale dtypes (`f32`,
`bf16`, `f16`, `e8m0`, `e4m3`), zero points (`zero`, `zero:float`, `zero:min`; integers only), rules, layouts
and 2:4 sparsity where they make sense: `int3[g64]`, `uint4[g32,f16,zero:min]`, `float7_e3m3[g32]`,
`int8[2:4]`. `bitfold formats` lists the recipes too.

"""


def formats_page() -> str:
    """docs/formats.md."""
    rows = [
        (f"`{r.name}`", f"`{r.stands_for}`", f"{r.bits:.3g}", r.range, r.rule, r.source) for r in describe()
    ]
    return HEADER + table(("name", "stands for", "bits", "range of a code", "scale", "source"), rows)


def made() -> dict[Path, str]:
    """Every made document and its whole text."""
    found = {DOCS / "formats.md": formats_page()}
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        if path not in found:
            found[path] = MADE.sub(
                lambda m, folder=path.parent: m[1] + result(m[2], m[3], beside=folder) + m[4],
                path.read_text(encoding="utf-8"),
            )
    return found


def main() -> int:
    """Write the documents, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is stale")
    check = parser.parse_args().check
    stale = [
        (path, text)
        for path, text in made().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is stale: run `python docs/make.py`")
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
