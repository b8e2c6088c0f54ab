"""Checks of what a recipe covers: what it asked for and did not get, what it skipped, what it never spoke of.

In: an `Inspection`. Out: findings.

    Rule("*.down", skip="sensitive")  ->  "left as it was by a rule, which says “sensitive”: 8 % of the
    weights" recipe int4, a head in float32    ->  "no rule speaks of it: 108 MiB, 64 % of what is held now,
    20 % of the time"
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from ...passes import MissRecord, Recipe
from ...passes.anchors import TARGETS
from ...passes.provenance import FROM_KEY, origin
from ..held import held_bytes, held_tensors
from ..inspection import Inspection
from .finding import Finding

# Told even where next to nothing is lost: what was asked for by name was not done.
_LEAST = 15.0
# What nobody spoke of is told where it is this part, in percent, of the time or of the bytes that are held.
_LARGE = 10.0


def not_done(found: Inspection) -> Iterator[Finding]:
    """Misses of all passes: skipped by a rule, or impossible; weighed by the bytes that stay as they were."""
    sizes = _float_bytes(found)
    whole = max(1, sum(sizes.values()))
    skips = {rule.skip for rule in found.recipe.rules if rule.skip} if found.recipe else set()
    for step in found.trace.steps:
        for miss in step.misses:
            share = 100.0 * sizes.get(miss.module_path, 0) / whole
            if step.name == "lower":
                yield _left(miss, found)
            elif miss.reason in skips:
                what = f"left as it was by a rule, which says “{miss.reason}”: {share:.0f} % of the weights"
                remedy = _other(found.recipe, miss.reason)
                yield Finding(max(_LEAST, 2 * share), "skipped", miss.module_path, what, remedy, miss.node)
            elif not miss.node:
                what = f"{miss.asked}: {miss.reason}"
                yield Finding(60.0, "unmatched", "the recipe", what, "correct the rule's pattern", "")
            else:
                asked = f"asked for {miss.asked}, not given: " if miss.asked else "not done: "
                remedy = "a format that fits its shape, by a rule of its own"
                yield Finding(
                    max(_LEAST, 2 * share), "missed", miss.module_path, asked + miss.reason, remedy, miss.node
                )


def _left(miss: MissRecord, found: Inspection) -> Finding:
    remedy = "a target that takes it; the reason says what stands against it"
    return Finding(
        80.0, "on reference", miss.module_path, f"no target runs it: {miss.reason}", remedy, miss.node
    )


def _other(recipe: Recipe | None, reason: str) -> str:
    rule = next((rule for rule in recipe.rules if rule.skip == reason), None) if recipe else None
    named = f" {rule.match!r}" if rule else ""
    return f"leave out the rule{named} if its reason no longer holds"


def never_asked(found: Inspection) -> Iterator[Finding]:
    """Layers that could take a format, and of which no rule speaks, where they are a large part of the
    whole."""
    asked = {node.name for step in found.trace.steps for node in step.snapshot if node.note}
    asked |= {miss.node for step in found.trace.steps for miss in step.misses}
    times = _times(found)
    sizes = {str(node.target): value.nbytes for node, value in held_tensors(found.reference).items()}
    whole = max(1, held_bytes(found.final))
    for weight, nodes in _readers(found).items():
        paths = list(dict.fromkeys(origin(node).module_path for node in nodes))
        if any(node.name in asked for node in nodes):
            continue
        of_bytes = 100.0 * sizes[weight] / whole
        of_time = 100.0 * sum(times.get(path, 0.0) for path in paths)
        if max(of_bytes, of_time) < _LARGE:
            continue
        shared = f" (one weight with {', '.join(paths[1:])})" if len(paths) > 1 else ""
        timed = f", {of_time:.0f} % of the time" if of_time else ""
        what = (
            f"no rule of the recipe speaks of it{shared}, and it stays as it was: "
            f"{sizes[weight] / 2**20:.1f} MiB, {of_bytes:.0f} % of what the model holds now{timed}"
        )
        rules = ", ".join(
            f"Rule(match='*{path.rpartition('.')[2]}', op='*', weight='int8')" for path in paths
        )
        # A choice that recipes make on purpose, and no fault: half of what a skipped layer has.
        points = max(of_bytes, of_time) / 2
        yield Finding(points, "not quantized", paths[0], what, f"a rule for it: {rules}", nodes[0].name)


def _readers(found: Inspection) -> dict[str, list[Node]]:
    """Float weight -> the layers of the captured graph that read it as such."""
    readers: dict[str, list[Node]] = {}
    held = held_tensors(found.reference)
    for node in found.reference.graph.nodes:
        operand = node.args[TARGETS[node.target][2]] if node.target in TARGETS else None
        if operand in held:
            readers.setdefault(str(operand.target), []).append(node)
    return readers


def _times(found: Inspection) -> dict[str, float]:
    """Module path -> its share of the time of all operators."""
    total = sum(done.seconds or 0.0 for done in found.work.values())
    paths = {node.name: origin(node).module_path for node in found.reference.graph.nodes}
    shares: dict[str, float] = {}
    for node in found.final.graph.nodes:
        done = found.work.get(node.name)
        if done is None or not done.seconds or not total:
            continue
        names = node.meta.get(FROM_KEY) or (node.name,)
        path = origin(node).module_path or next((paths[name] for name in names if name in paths), "")
        shares[path] = shares.get(path, 0.0) + done.seconds / total
    return shares


def _float_bytes(found: Inspection) -> dict[str, int]:
    """Bytes of the float weights that each module of the captured graph reads."""
    sizes: dict[str, int] = {}
    for node, value in held_tensors(found.reference).items():
        for user in node.users:
            if user.target in TARGETS:
                path = origin(user).module_path
                sizes[path] = sizes.get(path, 0) + value.nbytes
    return sizes
