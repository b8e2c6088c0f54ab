"""The parts of the documents that are made, not written: the table of formats and tables of results.

In: the formats themselves, and what the demo and benchmarks wrote to `benchmarks/results/`. Out:
`docs/formats.md`; README.md and docs/notes/ptq.md with what stands between `<!-- table: NAME -->` and
`<!-- end -->` made anew.

    python docs/make.py            write them
    python docs/make.py --check    exit 1 and say so if one of them is stale (a test does this)

Speeds are ratios to the float model in the same run; a time in seconds is quoted for a named GPU only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitfold.formats.table import describe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
    return HEADER + _table(("name", "stands for", "bits", "range of a code", "scale", "source"), rows)


def demo_table() -> str:
    """One table for each run of the demo that is committed."""
    found = []
    for path in sorted(RESULTS.glob("demo-*.json")):
        found.append(_demo(json.loads(path.read_text(encoding="utf-8")), path))
    return "\n".join(found)


def _demo(record: dict[str, Any], path: Path) -> str:
    where, trials = record["where"], record["trials"]
    base = trials[0]
    batches = list(base["speeds"])
    head = ["recipe", "weights", "perplexity", "change"]
    head += [f"speed, batch {n}" for n in batches] + ["compile time"]
    rows = [_trial(trial, base, batches) for trial in trials]
    device = f"{where['device']}, {where['threads']} threads"
    return (
        f"{device}, torch {where['torch']} "
        f"([raw output]({path.relative_to(ROOT).as_posix()}); speeds and compile times relative to "
        f"`{base['recipe']}`):\n\n" + _table(head, rows)
    )


def _trial(trial: dict[str, Any], base: dict[str, Any], batches: Sequence[str]) -> Sequence[str]:
    def compiled(t: dict[str, Any]) -> float:
        return sum(t["speeds"][n]["compile_seconds"] for n in batches)

    def faster(n: str) -> str:
        ratio = trial["speeds"][n]["tokens_per_second"] / base["speeds"][n]["tokens_per_second"]
        return f"{ratio:.2f}x"

    change = "" if trial is base else f"{trial['perplexity'] / base['perplexity'] - 1:+.2%}"
    return (
        f"`{trial['recipe']}`",
        f"{trial['bytes'] / 2**20:.0f} MiB",
        f"{trial['perplexity']:.3f}",
        change,
        *(faster(n) for n in batches),
        f"{compiled(trial) / compiled(base):.2f}x",
    )


def gemm_table() -> str:
    """One table for each card that `benchmarks/plot_gemm.py` has written down."""
    found = []
    for path in sorted(RESULTS.glob("gemm-*.md")):
        text = path.read_text(encoding="utf-8")
        lines = text[text.index("| format |") :].split("\n\n")[0]
        card = text.splitlines()[0].rpartition(" on ")[2]
        link = path.relative_to(ROOT).as_posix()
        rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
        timed = (row["peer"] for row in rows if row["us"] and row["peer"] != "bitfold")
        peers = ", ".join(dict.fromkeys(timed))
        head = f"{card}, against {peers} ([everything]({link}), `python benchmarks/gemm.py`)"
        found.append(f"{head}:\n\n{lines}\n")
    return "\n".join(found)


def llama_table() -> str:
    """One table for each run of `benchmarks/llama_decode.py` that is committed."""
    found = []
    for path in sorted(RESULTS.glob("llama-*.json")):
        found.append(_llama(json.loads(path.read_text(encoding="utf-8")), path))
    return "\n".join(found)


def _llama(record: dict[str, Any], path: Path) -> str:
    rows = {(row["variant"], row["batch"]): row for row in record["rows"]}
    batches = sorted({batch for _, batch in rows})
    head = ["", *(f"batch {batch}, ms a token" for batch in batches), "memory", "compiled in"]
    lines = []
    for who in dict.fromkeys(row["variant"] for row in record["rows"]):
        mine = [rows[who, batch] for batch in batches]
        plain = [rows.get(("bf16", batch)) for batch in batches]
        times = [
            f"{row['ms']:.2f}" + (f" ({base['ms'] / row['ms']:.2f}x)" if base else "")
            for row, base in zip(mine, plain, strict=True)
        ]
        seconds = max(row["compile_s"] for row in mine)
        lines.append((f"`{who}`", *times, f"{mine[0]['memory'] / 1e9:.1f} GB", f"{seconds:.0f} s"))
    link = path.relative_to(ROOT).as_posix()
    return (
        f"{record['card']}, torch {record['torch']} ([raw output]({link}), "
        f"`python benchmarks/llama_decode.py`):\n\n" + _table(head, lines)
    )


def cpu_table() -> str:
    """One table for each run of `benchmarks/cpu_decode.py` that is committed."""
    found = []
    for path in sorted(RESULTS.glob("cpu-model-*.json")):
        found.append(_cpu(json.loads(path.read_text(encoding="utf-8")), path))
    return "\n".join(found)


def _cpu(record: dict[str, Any], path: Path) -> str:
    rows = {(row["who"], row["case"]): row for row in record["rows"]}
    cases = list(dict.fromkeys(row["case"] for row in record["rows"]))
    head = ["", *(f"{case}, tokens/s" for case in cases), "compiled in"]
    lines = []
    for who in dict.fromkeys(row["who"] for row in record["rows"]):
        mine = [rows.get((who, case)) for case in cases]
        seconds = [row["compile_s"] for row in mine if row and "compile_s" in row]
        lines.append((f"`{who}`", *map(_speed, mine, [rows.get(("float32", case)) for case in cases]),
                      f"{max(seconds):.0f} s" if seconds else ""))  # fmt: skip
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    clock = ", the thread's own time" if record["clock"] == "processor" else ""
    return (
        f"{record['machine']}, {threads}{clock}, torch {record['torch']} "
        f"([raw output]({path.relative_to(ROOT).as_posix()}), `python benchmarks/cpu_decode.py`):\n\n"
        + _table(head, lines)
    )


def _speed(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = f" ({row['tokens_s'] / base['tokens_s']:.2f}x)" if base is not None else ""
    return f"{row['tokens_s']:.1f}{ratio}"


def ptq_table() -> str:
    """One table for each run of `benchmarks/ptq.py` that is committed."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from ptq_table import table

    found = []
    for path in sorted(RESULTS.glob("ptq-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        asked, link = record["asked"], path.relative_to(ROOT).as_posix()
        found.append(
            f"{record['where']['device']}, {record['windows']['test'][0]} windows of test text, "
            f"{asked['calibration']} of calibration (raw output: `{link}`, `python benchmarks/ptq.py`). "
            + table(record)
            + "\n"
        )
    return "\n".join(found)


def ptq_short() -> str:
    """The same runs, three lines a format: rounding, GPTQ alone, and the best by the validation text."""
    found = []
    for path in sorted(RESULTS.glob("ptq-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        by_format: dict[str, dict[str, Any]] = {}
        for row in record["rows"]:
            by_format.setdefault(row["format"], {})[row["algorithm"]] = row
        link = path.relative_to(ROOT).as_posix()
        found.append(
            f"{record['where']['device']}, float {record['float']['test']:.2f} "
            f"([raw output]({link}), `python benchmarks/ptq.py`):\n"
        )
        rows = [
            [
                f"`{name}`",
                f"{ways['rounding']['bits']:.2f}",
                f"{ways['rounding']['change']:+.2%}",
                f"{ways['gptq']['change']:+.2%}",
                f"{ways['best']['change']:+.2%} (`{ways['best']['variant']}`)",
                f"{ways['best']['won_divergence']:.0%}",
            ]
            for name, ways in by_format.items()
            if {"rounding", "gptq", "best"} <= set(ways)
        ]
        head = ("format", "bits", "rounding", "`gptq`", "best", "less divergence")
        found.append(_table(head, rows))
    return "\n".join(found)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def made() -> dict[Path, str]:
    """Every made document and its whole text."""
    tables = {
        "demo": demo_table(),
        "gemm": gemm_table(),
        "llama": llama_table(),
        "cpu": cpu_table(),
        "ptq": ptq_table(),
        "ptq_short": ptq_short(),
    }
    found = {ROOT / "docs" / "formats.md": formats_page()}
    for path in (ROOT / "README.md", ROOT / "docs" / "notes" / "ptq.md"):
        found[path] = re.sub(
            r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
            lambda m: m[1] + tables[m[2]] + m[3],
            path.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
    return found


def main() -> int:
    """Write the documents, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is stale")
    check = parser.parse_args().check
    stale = [p for p, text in made().items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is stale: run `python docs/make.py`")
        else:
            path.write_text(made()[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
