"""What an inspection adds to the page's data: numbers to colour nodes by, kernels, histograms, the roof.

In: an `Inspection`. Out: plain data, by the names of nodes.

    {"work": {"fused_default": [flops, bytes, microseconds], ...}, "kernels": {"fused_default": {"source": 0,
    ...}},
     "sources": ["// linear ..."], "weights": {"fc_weight_codes": {...}}, "flows": {"relu": {...}},
     "targets": {"fused_fc": "cpu"}, "roof": {"name": ..., "read": 2e10, "flops": 3e11}}

Texts of kernels are written once however many nodes call them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

from ...lowering.lower import TAKEN_BY
from ...passes.provenance import FROM_KEY
from .errors import NodeError

if TYPE_CHECKING:
    from ..inspection import Inspection
    from ..work import Work

Json = dict[str, Any]


def overlay_data(found: Inspection) -> Json:
    """All that is not the trace's own."""
    sources: dict[str, int] = {}
    kernels = {}
    for name, kernel in found.kernels.items():
        number = sources.setdefault(kernel.source, len(sources))
        kernels[name] = {**kernel.as_json(), "source": number if kernel.source else None}
        if found.roof is not None and name in found.work:
            done = found.work[name]
            least = found.roof.seconds(done.flops, done.bytes)
            kernels[name] |= {"roof_us": least * 1e6, "bound": found.roof.bound(done.flops, done.bytes)}
    work = {**region_work(found.gm, found.final, found.work), **found.work}
    return {
        "work": {name: _work(done) for name, done in work.items()},
        "baseline": {name: _work(done) for name, done in found.baseline.items()},
        "kernels": kernels,
        "kernels_of": kernels_of(found),
        "sources": list(sources),
        "weights": {name: stats.as_json() for name, stats in found.weights.items()},
        "flows": {name: flow.as_json() for name, flow in found.flows.items()},
        "targets": targets(found),
        "roof": None
        if found.roof is None
        else {"name": found.roof.name, "read": found.roof.read, "flops": found.roof.flops},
        "recipe": "" if found.recipe is None else found.recipe.name,
    }


def _work(done: Work) -> list[float | int | None]:
    return [done.flops, done.bytes, None if done.seconds is None else round(done.seconds * 1e6, 3)]


def targets(found: Inspection) -> dict[str, str]:
    """Who runs each node: of lowered regions the target that took them; of the last step a generated kernel,
    or the compiler of the target that takes the rest."""
    taken = {node.name: str(node.meta[TAKEN_BY]) for node in found.gm.graph.nodes if TAKEN_BY in node.meta}
    if found.final is found.gm or not taken:
        return taken
    first = next(iter(taken.values()))
    rest = "operator by operator" if first == "reference" else "Inductor"
    for node in found.final.graph.nodes:
        if node.op.startswith("call_"):
            kernel = found.kernels.get(node.name)
            taken[node.name] = rest if kernel is None else f"{first}, {kernel.language}"
    return taken


def kernels_of(found: Inspection) -> dict[str, list[str]]:
    """Region of the lowered graph -> the nodes of the last step that run it on generated kernels."""
    owner = _owners(found.gm)
    names: dict[str, list[str]] = {}
    for node in found.final.graph.nodes:
        if node.name in found.kernels:
            for region in dict.fromkeys(owner[name] for name in _from(node) if name in owner):
                names.setdefault(region, []).append(node.name)
    return names


def all_errors(found: Inspection) -> dict[str, NodeError]:
    """Errors by node; those of regions also by the kernels that run them in the last step. A region's own
    error is the worst of what is known inside: a residual that is added at its end would hide that of the
    product."""
    errors = dict(found.errors)
    for node in found.gm.graph.nodes:
        if node.op == "call_module" and node.name in errors:
            inside = [errors[name].isolated_db for name in _from(node) if name in errors]
            worst = min([errors[node.name].isolated_db, *inside], key=lambda db: (math.isnan(db), db))
            errors[node.name] = replace(errors[node.name], isolated_db=worst)
    for region, kernels in kernels_of(found).items():
        for kernel in kernels:
            known = errors.get(kernel)
            if region in errors and (known is None or errors[region].isolated_db < known.isolated_db):
                errors[kernel] = errors[region]
    return errors


def region_work(gm: GraphModule, final: GraphModule, work: Mapping[str, Work]) -> dict[str, Work]:
    """The work of each region of the lowered graph: of the nodes that the last step has for it. A kernel that
    took in several regions counts for the first of them."""
    from ..work import Work

    owner = _owners(gm)
    total: dict[str, Work] = {}
    for node in final.graph.nodes:
        region = _region(node, owner)
        done = work.get(node.name)
        if region is None or done is None:
            continue
        before = total.get(region, Work(0, 0, 0.0))
        seconds = None if done.seconds is None else (before.seconds or 0.0) + done.seconds
        total[region] = Work(before.flops + done.flops, before.bytes + done.bytes, seconds)
    return total


def _owners(gm: GraphModule) -> dict[str, str]:
    """Captured node -> the region that it went into."""
    owner: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            for name in node.meta.get(FROM_KEY, ()):
                owner.setdefault(name, node.name)
    return owner


def _region(node: Node, owner: Mapping[str, str]) -> str | None:
    return next((owner[name] for name in _from(node) if name in owner), None)


def _from(node: Node) -> tuple[str, ...]:
    return node.meta.get(FROM_KEY) or (node.name,)
