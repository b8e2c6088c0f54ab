"""Tables of results: what a script of `benchmarks/` wrote, as Markdown.

In: the name of a table and a file of `benchmarks/results/`. Out: the sentence that says the machine, the raw
output and the script, and the table. `make.py` puts them where a document has `<!-- table: NAME FILE -->`.

Speeds are ratios to the float model in the same run; a time in seconds is quoted for a named GPU only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpu_tables import cpu_instructions, cpu_pages
from markdown_table import table
from ptq_tables import ptq, ptq_short, search_sizes, search_times
from training_tables import qat_images, qat_lm, qat_step
from vision_tables import vision, vision_times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Of peers in plots of matrix products: not a kernel that somebody would take instead.
OURS = "bitfold"


def demo(record: dict[str, Any], raw: str) -> str:
    """What `bitfold demo` measured of each recipe, against the first of them."""
    where, trials = record["where"], record["trials"]
    base = trials[0]
    batches = list(base["speeds"])
    head = ["recipe", "weights", "perplexity", "change"]
    head += [f"speed, batch {n}" for n in batches] + ["compile time"]
    return (
        f"{where['device']}, {where['threads']} threads, torch {where['torch']} "
        f"({raw}; speeds and compile times relative to `{base['recipe']}`):\n\n"
        + table(head, [_trial(trial, base, batches) for trial in trials])
    )


def _trial(trial: dict[str, Any], base: dict[str, Any], batches: Sequence[str]) -> Sequence[str]:
    def compiled(t: dict[str, Any]) -> float:
        return sum(t["speeds"][n]["compile_seconds"] for n in batches)

    def faster(n: str) -> str:
        ratio = trial["speeds"][n]["tokens_per_second"] / base["speeds"][n]["tokens_per_second"]
        return f"{ratio:.2f}x"

    return (
        f"`{trial['recipe']}`",
        f"{trial['bytes'] / 2**20:.0f} MiB",
        f"{trial['perplexity']:.3f}",
        "" if trial is base else f"{trial['perplexity'] / base['perplexity'] - 1:+.2%}",
        *(faster(n) for n in batches),
        f"{compiled(trial) / compiled(base):.2f}x",
    )


def kernels(record: dict[str, Any], raw: str) -> str:
    """The largest matrix of a run: bf16's time, and how many times faster each format's product is."""
    rows = [row for row in record["rows"] if row["us"]]
    n, k = max(((row["n"], row["k"]) for row in rows), key=lambda shape: shape[0] * shape[1])
    rows = [row for row in rows if (row["n"], row["k"]) == (n, k)]
    counts = sorted({row["m"] for row in rows if row["peer"] == OURS})
    plain = {row["m"]: row["us"] for row in rows if row["peer"] == "bf16"}
    ours = {(row["format"], row["m"]): row for row in rows if row["peer"] == OURS}
    lines = [["bf16 (cuBLAS)", *(f"{plain[m]:.1f} us" for m in counts), ""]]
    for name in dict.fromkeys(name for name, _ in ours):
        mine = [ours.get((name, m)) for m in counts]
        times = [
            f"{row['us']:.1f} us ({plain[m] / row['us']:.2f}x)" if row else ""
            for m, row in zip(counts, mine, strict=True)
        ]
        roof = f"{mine[0]['roof']:.0%}" if mine[0] else ""
        lines.append([f"`{name}`", *times, roof])
    head = ["weights", *(f"M={m}" for m in counts), f"of the roof, M={counts[0]}"]
    return (
        f"{record['card']}, torch {record['torch']}, N={n}, K={k} "
        f"({raw}, `python benchmarks/gemm.py`):\n\n" + table(head, lines)
    )


def gemm(record: dict[str, Any], raw: str, page: Path) -> str:
    """The summary of a page of `benchmarks/plot_gemm.py`: the best peer's time over ours."""
    text = page.read_text(encoding="utf-8")
    lines = text[text.index("| format |") :].split("\n\n")[0]
    timed = (row["peer"] for row in record["rows"] if row["us"] and row["peer"] != OURS)
    peers = ", ".join(dict.fromkeys(timed))
    return f"{record['card']}, against {peers} ({raw}, `python benchmarks/gemm.py`):\n\n{lines}\n"


def llama(record: dict[str, Any], raw: str) -> str:
    """A run of `benchmarks/llama_decode.py`."""
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
    return (
        f"{record['card']}, torch {record['torch']} ({raw}, `python benchmarks/llama_decode.py`):\n\n"
        + table(head, lines)
    )


def cpu(record: dict[str, Any], raw: str) -> str:
    """A run of `benchmarks/cpu_decode.py`."""
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
        f"({raw}, `python benchmarks/cpu_decode.py`):\n\n" + table(head, lines)
    )


def cpu_linears(record: dict[str, Any], raw: str) -> str:
    """Single products of a run of `benchmarks/cpu.py`, as speeds against float32."""
    at = {(row["format"], row["n"], row["k"], row["m"]): row["us"] for row in record["rows"]}
    places = list(dict.fromkeys((n, k, m) for _, n, k, m in at))
    lines = []
    for name in dict.fromkeys(name for name, *_ in at):
        mine = [at.get((name, *place)) for place in places]
        plain = [at["float32", *place] for place in places]
        lines.append([name, *(f"{b / t:.2f}x" if t else "" for t, b in zip(mine, plain, strict=True))])
    head = ["", *(f"{n} x {k}, M={m}" for n, k, m in places)]
    return (
        f"{record['machine']}, {record['threads']} threads, torch {record['torch']} "
        f"({raw}, `python benchmarks/cpu.py --peers`):\n\n" + table(head, lines)
    )


def _speed(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = f" ({row['tokens_s'] / base['tokens_s']:.2f}x)" if base is not None else ""
    return f"{row['tokens_s']:.1f}{ratio}"


TABLES: dict[str, Callable[[dict[str, Any], str], str]] = {
    "demo": demo, "kernels": kernels, "llama": llama, "cpu": cpu, "cpu_linears": cpu_linears, "ptq": ptq,
    "ptq_short": ptq_short, "search_sizes": search_sizes, "search_times": search_times, "vision": vision,
    "cpu_pages": cpu_pages, "cpu_instructions": cpu_instructions,
    "vision_times": vision_times, "qat_lm": qat_lm, "qat_step": qat_step, "qat_images": qat_images,
}  # fmt: skip


def result(name: str, file: str, *, beside: Path) -> str:
    """The table `name` of a file of results, with links that hold in a document in the folder `beside`."""

    def link(path: Path, words: str) -> str:
        return f"[{words}]({Path(os.path.relpath(path, beside)).as_posix()})"

    path = RESULTS / file
    record = json.loads(path.read_text(encoding="utf-8"))
    if name == "gemm":
        page = path.with_suffix(".md")
        return gemm(record, link(page, "everything"), page)
    return TABLES[name](record, link(path, "raw output"))
