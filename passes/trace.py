"""What a pipeline did: per pass the options, the graph as plain data, the rewrites, the time, and the misses.

Comes in: a snapshot of the graph after each pass. Goes out: a `Trace` that prints as a table.

    print(trace)
    pass                   rewrites     nodes       new      gone   altered      time
    annotate{recipe=int4}         7        31         0         0         7   0.010 s
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from .core import MissRecord
from .graph_snapshot import GraphSnapshot, NodeSnapshot, Recorder, snapshot

__all__ = ["Change", "GraphSnapshot", "NodeSnapshot", "Recorder", "Step", "Trace", "compare", "snapshot"]


@dataclass(frozen=True)
class Change:
    """Names of the nodes that a pass added, removed, and altered in place."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One pass of a run. The first step of a trace is the graph as it came in, with the name `captured`."""

    name: str
    options: str
    stage: str
    snapshot: GraphSnapshot
    rewrites: int
    seconds: float
    misses: tuple[MissRecord, ...]
    changed: Change

    @property
    def code(self) -> str:
        """The graph after the pass, as text."""
        return str(self.snapshot)

    def __str__(self) -> str:
        return f"{self.name}{{{self.options}}}" if self.options else self.name


@dataclass(repr=False)
class Trace:
    """The steps of one run. It never keeps a weight alive: the graph itself is only weakly referenced."""

    steps: list[Step] = field(default_factory=list)
    _graph: Callable[[], GraphModule | None] = field(default=lambda: None)

    @property
    def gm(self) -> GraphModule | None:
        """The graph that the pipeline rewrote, while somebody else still holds it."""
        return self._graph()

    @property
    def misses(self) -> list[MissRecord]:
        """All that was asked for and not given."""
        return [miss for step in self.steps for miss in step.misses]

    @property
    def seconds(self) -> float:
        """Time in the passes, without verification and snapshots."""
        return sum(step.seconds for step in self.steps)

    @property
    def recorded(self) -> bool:
        """Whether the steps hold the graph (`Pipeline.run(record=True)`)."""
        return any(len(step.snapshot) for step in self.steps)

    def follow(self, gm: GraphModule) -> None:
        """Make `gm` this trace's graph."""
        self._graph = weakref.ref(gm)

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def __setstate__(self, data: dict[str, Any]) -> None:
        self.steps, self._graph = data["steps"], lambda: None

    def __repr__(self) -> str:
        passes = ",".join(str(step) for step in self.steps[1:])
        passes = passes if len(passes) <= 80 else f"{passes[:77]}..."
        return f"<Trace of {passes or 'nothing'}, {self.seconds:.3f} s, {len(self.misses)} missed>"

    def __str__(self) -> str:
        names = [str(step) for step in self.steps]
        width = max([len("pass"), *(len(name) for name in names)])
        heads = ("rewrites", "nodes", "new", "gone", "altered", "time")
        lines = [f"{'pass':{width}}  " + "  ".join(f"{head:>8}" for head in heads)]
        for name, step in zip(names, self.steps, strict=True):
            change = step.changed
            lines.append(
                f"{name:{width}}  {step.rewrites:>8}  {len(step.snapshot):>8}  {len(change.added):>8}  "
                f"{len(change.removed):>8}  {len(change.altered):>8}  {step.seconds:>6.3f} s"
            )
        if self.misses:
            lines.append("")
            lines.append("asked for and not given:")
            lines.extend(f"  {step.name}: {miss}" for step in self.steps for miss in step.misses)
        return "\n".join(lines)


def compare(before: GraphSnapshot, now: GraphSnapshot) -> Change:
    """What it takes to come from one to the other."""
    old = {node.name: node for node in before.nodes}
    new = {node.name: node for node in now.nodes}
    return Change(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        # A node that was left alone is the same record (`Recorder`), which needs no look.
        altered=tuple(
            name
            for name, node in new.items()
            if (was := old.get(name)) is not None and was is not node and _core(node) != _core(was)
        ),
    )


def _core(node: NodeSnapshot) -> tuple[Any, ...]:
    """What makes a node the same node; who uses it does not."""
    return node.op, node.target, node.args, node.shape, node.dtype, node.note, node.virtual_node
