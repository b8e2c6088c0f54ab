"""What a pipeline did: per pass the options, the graph as plain data, the rewrites, the time, and the misses.

Comes in: the graph after each pass. Goes out: a `Trace` that prints as a table, and `GraphSnapshot`s, which
hold names, shapes and texts but never a tensor, for tests and for the viewer.

    print(trace)
    pass                      rewrites  nodes  +new -gone ~changed    time
    annotate{recipe=int4}            7     31    +0    -0       ~7   0.01 s
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .core import META_KEY, MissRecord, state
from .provenance import FROM_KEY, origin
from .stages import find_attribute, operator_name


@dataclass(frozen=True)
class NodeSnapshot:
    """One node as plain data. `shape` holds ints, and text for symbolic sizes; `bytes` is None when
    unknown."""

    name: str
    op: str
    target: str
    args: str
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    shape: tuple[int | str, ...] | None
    dtype: str
    bytes: int | None
    module_path: str
    source: str
    text: str
    format: str
    note: str
    made_from: tuple[str, ...]

    def __str__(self) -> str:
        """`linear: f32[s0, 32] = aten.linear.default(x, w, b)`."""
        kind = f": {self.dtype}[{', '.join(map(str, self.shape))}]" if self.shape is not None else ""
        match self.op:
            case "placeholder":
                return f"{self.name}{kind} = input"
            case "get_attr":
                return f"{self.name}{kind} = self.{self.target}"
            case "output":
                return f"return {self.args}"
            case "call_module":
                return f"{self.name}{kind} = self.{self.target}({self.args})"
        return f"{self.name}{kind} = {self.target}({self.args})"


@dataclass(frozen=True)
class GraphSnapshot:
    """A graph as plain data, in execution order."""

    nodes: tuple[NodeSnapshot, ...]

    def __str__(self) -> str:
        """The graph as text, a line a node, annotations after `#`: what snapshot tests compare."""
        return "\n".join(f"{node}" + (f"  # {node.note}" if node.note else "") for node in self.nodes)

    def __iter__(self) -> Iterator[NodeSnapshot]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)


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


@dataclass
class Trace:
    """The steps of one run. It never keeps a weight alive: the graph itself is only weakly referenced."""

    steps: list[Step] = field(default_factory=list)
    _graph: Callable[[], GraphModule | None] = field(default=lambda: None, repr=False)

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

    def follow(self, gm: GraphModule) -> None:
        """Make `gm` this trace's graph."""
        self._graph = weakref.ref(gm)

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def __setstate__(self, data: dict[str, Any]) -> None:
        self.steps, self._graph = data["steps"], lambda: None

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


class Recorder:
    """Takes snapshots of one graph as it goes through a pipeline, redoing only the nodes that changed."""

    def __init__(self) -> None:
        self._known: dict[Node, tuple[tuple[Any, ...], NodeSnapshot]] = {}

    def snapshot(self, gm: GraphModule) -> GraphSnapshot:
        """The graph as it is now."""
        known: dict[Node, tuple[tuple[Any, ...], NodeSnapshot]] = {}
        for node in gm.graph.nodes:
            # fx puts new argument tuples in place when an argument changes, so identity tells.
            state_of_node = (
                node.name,
                node.target,
                node.args,
                node.kwargs,
                node.meta.get("val"),
                node.meta.get(META_KEY),
                tuple(node.users),
            )
            before = self._known.get(node)
            if before is None or any(
                old is not new for old, new in zip(before[0][:-1], state_of_node, strict=False)
            ):
                shown = _node(gm, node)
            elif before[0][-1] != state_of_node[-1]:
                shown = replace(before[1], users=tuple(user.name for user in node.users))
            else:
                shown = before[1]
            known[node] = (state_of_node, shown)
        self._known = known
        return GraphSnapshot(tuple(shown for _, shown in known.values()))

    def step(
        self,
        gm: GraphModule,
        name: str,
        options: str = "",
        *,
        before: GraphSnapshot | None = None,
        rewrites: int = 0,
        seconds: float = 0.0,
        misses: tuple[MissRecord, ...] = (),
    ) -> Step:
        """A step with the graph as it is now, compared with `before`."""
        now = self.snapshot(gm)
        change = Change() if before is None else _compare(before, now)
        return Step(name, options, state(gm).stage.name, now, rewrites, seconds, misses, change)


def snapshot(gm: GraphModule) -> GraphSnapshot:
    """The graph as plain data."""
    return Recorder().snapshot(gm)


@dataclass(frozen=True)
class _Kind:
    shape: tuple[int | str, ...] | None = None
    dtype: str = ""
    bytes: int | None = None


_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}


def short_dtype(dtype: torch.dtype) -> str:
    """`f32`, `bf16`, `u8`; other dtypes by their full name."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _kind(value: Any) -> _Kind:
    if not isinstance(value, Tensor):
        return _Kind(
            dtype=str(value) if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else ""
        )
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    count: int | None = 1
    for size in shape:
        count = count * size if count is not None and isinstance(size, int) else None
    return _Kind(shape, short_dtype(value.dtype), None if count is None else count * value.element_size())


def _node(gm: GraphModule, node: Node) -> NodeSnapshot:
    at, kind = origin(node), _kind(node.meta.get("val"))
    note = node.meta.get(META_KEY)
    return NodeSnapshot(
        name=node.name,
        op=node.op,
        target=target_text(node.target),
        args=_arguments(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        users=tuple(user.name for user in node.users),
        shape=kind.shape,
        dtype=kind.dtype,
        bytes=kind.bytes,
        module_path=at.module_path,
        source=at.where,
        text=at.text,
        format=_format(gm, node),
        note="" if note is None else str(note),
        made_from=tuple(node.meta.get(FROM_KEY, ())),
    )


@lru_cache(maxsize=4096)
def target_text(target: Any) -> str:
    """`aten.linear.default`, `getitem`, an attribute's path."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target is operator.getitem:
        return "getitem"
    return operator_name(target) or getattr(target, "__name__", repr(target))


def _arguments(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return ""
    if node.op == "output":
        return _value(node.args[0])
    given = [_value(value) for value in node.args]
    given += [f"{key}={_value(value)}" for key, value in node.kwargs.items()]
    return ", ".join(given)


def _value(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_value, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return short_dtype(value)
    return repr(value)


def _format(gm: GraphModule, node: Node) -> str:
    """The format that a bitfold operator works in, or that a region around one was outlined for."""
    if node.op == "call_module":
        region = find_attribute(gm, str(node.target))
        formats = getattr(getattr(region, "meta", {}).get("bitfold_region"), "formats", None)
        return ", ".join(map(str, formats)) if formats else ""
    if not operator_name(node.target).startswith("bitfold::"):
        return ""
    for index, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == "format":
            return str(node.args[index] if index < len(node.args) else node.kwargs.get("format", ""))
    return ""


def _compare(before: GraphSnapshot, now: GraphSnapshot) -> Change:
    old = {node.name: node for node in before.nodes}
    new = {node.name: node for node in now.nodes}
    return Change(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        altered=tuple(name for name, node in new.items() if name in old and _core(node) != _core(old[name])),
    )


def _core(node: NodeSnapshot) -> tuple[Any, ...]:
    """What makes a node the same node; who uses it does not."""
    return node.op, node.target, node.args, node.shape, node.dtype, node.note
