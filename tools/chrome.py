"""A profile of the final graph in Chrome's trace format, in which every operator and GPU kernel says where it
is from.

In: an `Inspection`, the inputs. Out: a JSON file for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

    export(found, (x,), "trace.json")
    {"name": "bitfold::fused", "args": {"bitfold": {"node": "fused_default_3", "module": "layers.0.down",
     "source": "model.py:41", "pass": "finish", "format": "int4[g64]", "kernel": "linear 256x512 ..."}}}

The profiler is torch's. Each node runs in a range of its own; what lies in a range in time, and GPU kernels
that were launched from it, get its provenance. A track `modules` shows the module tree as nested spans."""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lowering.files.paths import place_of
from .held import as_it_was
from .inspection import Inspection
from .text_file import write_text
from .viz.overlay import targets
from .work import RANGE, Named, profiled

Event = dict[str, Any]
_TRACK = 1_000_000  # number of the track of modules: no thread of a process has it


def export(found: Inspection, inputs: Sequence[Any], path: str | os.PathLike[str]) -> Path:
    """One call after one to warm up. BitfoldError if the place cannot be written."""
    place_of(path)
    cuda = any(given.is_cuda for given in inputs if isinstance(given, Tensor))
    with torch.no_grad(), as_it_was(found.final, inputs):
        Named(found.final).run(*inputs)
        with profiled(cuda) as seen:
            Named(found.final).run(*inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        data = json.loads(file.read_text(encoding="utf-8"))
    data["traceEvents"] = with_provenance(data["traceEvents"], provenance(found))
    return write_text(path, json.dumps(data))


def provenance(found: Inspection) -> dict[str, dict[str, str]]:
    """Node of the final graph -> what there is to say of where it is from."""
    made: dict[str, str] = {}
    for step in found.trace.steps:
        made.update(dict.fromkeys(step.changed.added, str(step)))
    by_node = targets(found)
    last = found.trace.steps[-1].snapshot
    told = {}
    for node in last:
        kernel = found.kernels.get(node.name)
        facts = {
            "node": node.name,
            "module": node.module_path,
            "source": f"{node.source} {node.text}".strip(),
            "pass": made.get(node.name, "captured"),
            "made from": ", ".join(node.made_from),
            "target": by_node.get(node.name, ""),
            "kernel": "" if kernel is None else f"{kernel.spec} {kernel.schedule}".strip(),
        }
        told[node.name] = {key: value for key, value in facts.items() if value}
    return told


def with_provenance(events: list[Event], told: dict[str, dict[str, str]]) -> list[Event]:
    """The events, each with its node's provenance in its arguments, and the track of modules behind them."""
    ranges = [e for e in events if _is_range(e) and e.get("cat") != "gpu_user_annotation"]
    ranges.sort(key=lambda event: event["ts"])
    by_thread: dict[Any, list[Event]] = {}
    for one in ranges:
        by_thread.setdefault((one["pid"], one["tid"]), []).append(one)
    launched: dict[Any, str] = {}
    for event in events:
        node = _node_of(event, by_thread)
        if node is None:
            continue
        event.setdefault("args", {})["bitfold"] = told.get(node, {"node": node})
        for key in ("External id", "correlation"):
            if (number := event["args"].get(key)) is not None:
                launched[key, number] = node
    for event in events:
        if event.get("ph") != "X" or "bitfold" in event.get("args", {}):
            continue
        keys = [(key, event.get("args", {}).get(key)) for key in ("correlation", "External id")]
        node = next((launched[key] for key in keys if key in launched), None)
        if node is not None:
            event.setdefault("args", {})["bitfold"] = told.get(node, {"node": node})
    return [*events, *_module_track(ranges, told)]


def _is_range(event: Event) -> bool:
    return event.get("ph") == "X" and str(event.get("name", "")).startswith(RANGE)


def _node_of(event: Event, by_thread: dict[Any, list[Event]]) -> str | None:
    """The node in whose range the event lies, on its thread."""
    if event.get("ph") != "X" or "ts" not in event:
        return None
    ranges = by_thread.get((event.get("pid"), event.get("tid")), [])
    at = bisect_right(ranges, event["ts"], key=lambda one: one["ts"]) - 1
    if at < 0:
        return None
    inside = event["ts"] + event.get("dur", 0) <= ranges[at]["ts"] + ranges[at]["dur"] + 1e-3
    return str(ranges[at]["name"]).removeprefix(RANGE) if inside else None


def _module_track(ranges: list[Event], told: dict[str, dict[str, str]]) -> Iterator[Event]:
    """A span for each stay in a module, nested as the modules are."""
    open_: list[tuple[str, float]] = []
    last = 0.0

    def close(depth: int) -> Iterator[Event]:
        while len(open_) > depth:
            name, began = open_.pop()
            span = {"ph": "X", "cat": "module", "name": name, "pid": ranges[0]["pid"], "tid": _TRACK}
            yield {**span, "ts": began, "dur": max(0.0, last - began)}

    if ranges:
        about = {"ph": "M", "name": "thread_name", "args": {"name": "modules"}}
        yield {**about, "pid": ranges[0]["pid"], "tid": _TRACK}
    for one in ranges:
        path = told.get(str(one["name"]).removeprefix(RANGE), {}).get("module", "")
        parts = path.split(".") if path else []
        names = [".".join(parts[: i + 1]) for i in range(len(parts))]
        same = 0
        while same < min(len(open_), len(names)) and open_[same][0] == names[same]:
            same += 1
        yield from close(same)
        open_.extend((name, one["ts"]) for name in names[same:])
        last = one["ts"] + one["dur"]
    yield from close(0)
