"""Tables of images and sentences, as Markdown: what `benchmarks/vision_and_text.py` wrote.

In: a record of `benchmarks/results/` and the link to it. Out: the sentence that says the machine, the raw
output, the script and what it was asked, and the table, as those of `tables.py`, which lists these.
"""

from __future__ import annotations

from typing import Any

from markdown_table import table

Rows = dict[str, dict[str, Any]]
"""Rows of a model by their way."""


def vision(record: dict[str, Any], raw: str) -> str:
    """What every way of a run of `benchmarks/vision_and_text.py` loses, model by model."""
    rows, asked = _by_model(record), _one(record, "asked")
    cells = {"digits": _digits, "lite0": _lite0, "minilm": _minilm}
    ways = list(dict.fromkeys(way for model in ("minilm", "lite0") for way in rows[model]))
    lines = [
        [f"`{way}`", *(cell(rows[model][way]) if way in rows[model] else "" for model, cell in cells.items())]
        for way in ways
    ]
    own = rows["lite0"]["float32"]["loss"]
    return (
        f"{_machine(record)}, {asked['crops']} crops, {asked['sentences']} sentences "
        f"({raw}, `python benchmarks/vision_and_text.py`). EfficientNet-Lite0 in float32 has a median margin "
        f"of {own['median margin']:.1f} % between its two best classes; it is sure (5 % or more) of "
        f"{own['sure']:.0f} % of the crops:\n\n"
        + table(
            [
                "weights and activations",
                "digits: accuracy, noise",
                "EfficientNet-Lite0: same class, where sure, largest margin of a change, noise",
                "MiniLM: cosine, mean and least",
            ],
            lines,
        )
    )


def _digits(row: dict[str, Any]) -> str:
    loss = row["loss"]
    noise = "" if row["way"] == "float32" else f", {loss['dB']:.1f} dB"
    return f"{loss['accuracy']:.1f} %{noise} ({_size(row)})"


def _lite0(row: dict[str, Any]) -> str:
    loss = row["loss"]
    if row["way"] == "float32":
        return f"({_size(row)})"
    return (
        f"{loss['same class']:.0f} %, {loss['where sure']:.0f} %, "
        f"{loss['largest margin of a change']:.1f} %, {loss['dB']:.1f} dB ({_size(row)})"
    )


def _minilm(row: dict[str, Any]) -> str:
    loss = row["loss"]
    if row["way"] == "float32":
        return f"({_size(row)})"
    return f"{loss['cosine, mean']:.4f}, {loss['cosine, least']:.4f} ({_size(row)})"


def _size(row: dict[str, Any]) -> str:
    return f"{row['bytes'] / 2**20:.3g} MiB"


def vision_times(record: dict[str, Any], raw: str) -> str:
    """Bytes, loss and speed of the ways that a run of `benchmarks/vision_and_text.py` timed."""
    names = {"digits": "digits", "lite0": "EfficientNet-Lite0", "minilm": "MiniLM"}
    rows, asked = _by_model(record), _one(record, "asked")
    lines = []
    for model, ways in rows.items():
        base = ways["float32"]
        for way, row in ways.items():
            if way == "float32":
                continue
            speeds = [f"{base['ms'][batch] / ms:.2f}x" for batch, ms in row["ms"].items()]
            said = _said(row["loss"], base["loss"])
            lines.append([f"{names[model]}, `{way}`", f"{row['bytes'] / base['bytes']:.2f}", said, *speeds])
    batches = [f"speed, batch {batch}" for batch in asked["batches"]]
    return (
        f"{_machine(record)}, {asked['crops']} crops, {asked['sentences']} sentences, against Inductor's "
        f"float32 in the same run ({raw}, `python benchmarks/vision_and_text.py --observers "
        f"{' '.join(asked['observers'])} --seconds {asked['seconds']:g}`):\n\n"
        + table(["", "bytes", "loses", *batches], lines)
    )


def _said(loss: dict[str, float], base: dict[str, float]) -> str:
    if "accuracy" in loss:
        return f"accuracy {loss['accuracy']:.1f} %, float32 {base['accuracy']:.1f} %"
    if "same class" in loss:
        return f"same class on {loss['same class']:.0f} %, {loss['where sure']:.0f} % where sure"
    return f"cosine {loss['cosine, mean']:.4f}"


def _by_model(record: dict[str, Any]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in record["rows"]:
        found.setdefault(row["model"], {})[row["way"]] = row
    return found


def _one(record: dict[str, Any], key: str) -> Any:
    """What is the same for all models of a record; a table of runs that differ would say what is not so."""
    first, *others = (about[key] for about in record["about"].values())
    if any(one != first for one in others):
        raise ValueError(f"the models of this record differ in {key}: {[first, *others]}")
    return first


def _machine(record: dict[str, Any]) -> str:
    vectors = {"avx2": "AVX2", "avx512": "AVX-512", "avx512vnni": "AVX-512 with VNNI"}
    threads = _one(record, "asked")["threads"]
    return (
        f"{_one(record, 'processor')} ({vectors[_one(record, 'vectors')]}), "
        f"{threads} thread{'s' if threads > 1 else ''}, torch {_one(record, 'torch')}"
    )
