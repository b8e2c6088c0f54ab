"""The page's data: a trace as plain JSON, small because a node that a pass left alone is written once.

Comes in: a `Trace`, errors per node. Goes out: a dictionary of lists, texts and numbers.

    {"records": [{"name": "x", ...}, {"name": "linear", ...}, {"name": "linear", ...}],
     "steps":   [{"name": "captured", "ids": [0, 1], ...}, {"name": "annotate", "ids": [0, 2], ...}], ...}

Two steps with the same number for a node hold the same node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.fx import GraphModule

from ...passes.core import MissRecord, state
from ...passes.trace import GraphSnapshot, NodeSnapshot, Step, Trace, snapshot
from .errors import NodeError
from .kinds import KINDS, kinds_of
from .tensors import without_layout

Json = dict[str, Any]

_JSON_RECIPE = re.compile(r'recipe=("\{(?:[^"\\]|\\.)*")')
_SPEC = re.compile(
    r"'(?:linear \S+ \S+|grouped \d+ \S+ \S+|conv \S+(?: [spdg]\d+(?:x\d+)*)*) (?:\d+\*)?(\S+)[^']*'\)?$"
)


def page_data(
    trace: Trace,
    *,
    errors: Mapping[str, NodeError] | None = None,
    title: str | None = None,
    overlays: Json | None = None,
) -> Json:
    """All that the page shows. Linear in the nodes of all steps."""
    table = _Table()
    parameters = frozenset(state(trace.gm).params) if trace.gm is not None else frozenset()
    missed: set[str] = set()
    kinds: dict[str, str] = {}
    formats: dict[str, str] = {}
    steps = []
    for step in trace.steps:
        missed.update(miss.node for miss in step.misses)
        kinds = kinds_of(step.snapshot, missed=missed, parameters=parameters, before=kinds)
        formats = _formats(step.snapshot, formats, kinds)
        records = _records(step.snapshot, kinds, formats)
        steps.append(_step(step, [table.number(record) for record in records], _weight_bytes(records)))
    return {
        "title": title or _title(trace),
        "summary": _summary(trace, steps),
        "kinds": [asdict(kind) for kind in KINDS],
        "records": table.records,
        "steps": steps,
        "errors": {name: error.as_json() for name, error in (errors or {}).items()},
        "regions": _regions(trace.gm),
        "overlays": overlays or {},
    }


class _Table:
    """Records by their contents, each written once."""

    def __init__(self) -> None:
        self.records: list[Json] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def number(self, record: Json) -> int:
        key = tuple(tuple(value) if isinstance(value, list) else value for value in record.values())
        found = self._numbers.setdefault(key, len(self.records))
        if found == len(self.records):
            self.records.append(record)
        return found


def _records(graph: GraphSnapshot, kinds: Mapping[str, str], formats: Mapping[str, str]) -> list[Json]:
    groups = _groups(graph, kinds)
    held: set[str] = set()  # a constant read under two names is held once
    records = []
    for node in graph:
        kind = kinds[node.name]
        weight_bytes = None
        if kind in ("weight", "parameter") and node.users and node.target not in held:
            held.add(node.target)
            weight_bytes = node.bytes
        records.append(_record(node, kind, groups[node.name], formats.get(node.name, ""), weight_bytes))
    return records


def _record(node: NodeSnapshot, kind: str, group: str, format: str, weight_bytes: int | None) -> Json:
    return {
        "name": node.name,
        "op": node.op,
        "label": _label(node),
        "target": node.target,
        "code": str(node),
        "args": list(node.inputs),
        "shape": "" if node.shape is None else f"[{', '.join(map(str, node.shape))}]",
        "dtype": node.dtype,
        "bytes": node.bytes,
        "weight_bytes": weight_bytes,
        "module": node.module_path,
        "group": group,
        "source": node.source,
        "source_text": node.text,
        "format": format,
        "note": node.note,
        "kind": kind,
        "origins": list(node.made_from),
        "rule": node.rule,
        "virtual_node": node.virtual_node,
    }


def _label(node: NodeSnapshot) -> str:
    """What a box says: the operator without its namespace and overload, or a constant's path."""
    if node.op in ("placeholder", "output"):
        return node.name
    if node.op == "get_attr":
        return node.target
    if node.op == "call_module":
        return "fused" if node.format else node.target
    parts = node.target.replace("::", ".").split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _formats(graph: GraphSnapshot, before: Mapping[str, str], kinds: Mapping[str, str]) -> dict[str, str]:
    """Format by node: its own; for a constant that of its reader, in the last stage that had one."""
    found = {node.name: format for node in graph if (format := node.format or _of_kernel(node))}
    constants = {node.name for node in graph if node.op == "get_attr"}
    for node in graph:
        if node.name in found and node.op == "call_function":
            for name in constants.intersection(node.inputs):
                if node.format or kinds[name] == "weight":
                    found.setdefault(name, found[node.name])
    for name in constants.difference(found).intersection(before):
        found[name] = before[name]
    return found


def _of_kernel(node: NodeSnapshot) -> str:
    """The weight's format that a generated kernel's text says: `'linear 96x64 f32 2*int8 bias'`."""
    said = _SPEC.search(node.args) if node.target.startswith("bitfold.") else None
    return without_layout(said.group(1)) if said is not None else ""


def _groups(graph: GraphSnapshot, kinds: Mapping[str, str]) -> dict[str, str]:
    """The module in whose box each node is drawn. What the model takes and returns is outside of all; a
    constant without a place of its own goes to its readers."""
    groups = {node.name: "" if kinds[node.name] == "input" else node.module_path for node in graph}
    for node in reversed(graph.nodes):
        if node.op != "get_attr" and (node.module_path or node.op in ("placeholder", "output")):
            continue
        readers = [groups[user] for user in node.users]
        if readers:
            groups[node.name] = _common(readers)
    return groups


def _common(paths: list[str]) -> str:
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        same = 0
        while same < min(len(common), len(parts)) and common[same] == parts[same]:
            same += 1
        common = common[:same]
    return ".".join(common)


def _weight_bytes(records: list[Json]) -> int:
    return sum(record["weight_bytes"] or 0 for record in records)


def _step(step: Step, ids: list[int], weight_bytes: int) -> Json:
    return {
        "name": step.name,
        "options": _short(step.options),
        "all_options": step.options,
        "stage": step.stage,
        "rewrites": step.rewrites,
        "seconds": step.seconds,
        "weight_bytes": weight_bytes,
        "misses": [_miss(miss) for miss in step.misses],
        "ids": ids,
        "added": list(step.changed.added),
        "removed": list(step.changed.removed),
        "altered": list(step.changed.altered),
    }


def _short(options: str) -> str:
    """A recipe that is given as JSON by its name."""

    def name(found: re.Match[str]) -> str:
        try:
            recipe = json.loads(json.loads(found.group(1)))
            return f"recipe={recipe['name']}, {len(recipe['rules'])} rules"
        except (ValueError, TypeError, KeyError):  # another pass's option, which only looks like it
            return found.group(0)

    return _JSON_RECIPE.sub(name, options)


def _miss(miss: MissRecord) -> Json:
    return {
        "node": miss.node,
        "module": miss.module_path,
        "source": miss.source,
        "asked": miss.asked,
        "reason": miss.reason,
    }


def _regions(gm: GraphModule | None) -> dict[str, str]:
    """The inside of each outlined region of the final graph, while that graph still lives."""
    if gm is None:
        return {}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    modules = {name: gm.get_submodule(name) for name in sorted(called)}
    return {
        name: str(snapshot(module)) for name, module in modules.items() if isinstance(module, GraphModule)
    }


def _title(trace: Trace) -> str:
    # What a target does at last is no pass.
    passes = [
        f"{step.name}{{{_short(step.options)}}}" if step.options else step.name
        for step in trace.steps[1:]
        if step.name != "finish"
    ]
    return ", ".join(passes) or "captured graph"


def _summary(trace: Trace, steps: list[Json]) -> str:
    if not steps:
        return "the trace holds no step"
    first, last = steps[0], steps[-1]
    misses = len(trace.misses)
    return " · ".join(
        (
            f"weights {first['weight_bytes'] / 1e6:,.1f} → {last['weight_bytes'] / 1e6:,.1f} MB",
            f"{misses} missed" if misses else "nothing missed",
            f"{len(first['ids']):,} → {len(last['ids']):,} nodes",
            f"{trace.seconds:.2f} s",
        )
    )
