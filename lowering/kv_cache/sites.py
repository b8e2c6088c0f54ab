"""KV caches in a captured graph: a buffer that new tokens are written to and that one attention reads.

In: a graph. Out: for each attention over two such buffers a `Site`, or a Miss that says why it is none.

    %k = get_attr[a.k]; %p = index_put_(%k, [None, None, %pos], %new); %y = sdpa(%q, %p, ..)
    ->  Site(%y, k=Held("a.k", write=Write(%p, %new, %pos)), v=..)

Buffers are [B, Hkv, S, D]. Writes are `index_put`, `index_copy` and `copy_` to a slice of tokens, in place or
as a new tensor that is copied back; heads may be repeated between the buffer and the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...passes import Miss, state
from ...passes.constants import mutated
from ...passes.edit import argument
from ...passes.stages import find_attribute

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
_INDEXED = (aten.index_put_.default, aten.index_put.default)
_COPIED = (aten.index_copy_.default, aten.index_copy.default)
_NEW = (aten.index_put.default, aten.index_copy.default, aten.slice_scatter.default)
_SAME = (aten.contiguous.default, aten.clone.default, aten.alias.default)

_REPEATS = (
    *_SAME, aten.repeat_interleave.self_int, aten.unsqueeze.default, aten.expand.default,
    aten.reshape.default, aten.view.default, aten.flatten.using_ints,
)  # fmt: skip

Positions = Node | tuple[int, int]
"""A node of positions [T], or first and last + 1."""


@dataclass(frozen=True)
class Write:
    """`value` [B, Hkv, T, D] put at `positions`; `nodes`: all that does it, the last of them last."""

    value: Node
    positions: Positions
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Held:
    """A buffer and its one write; `sources`: the nodes that name it, `path`: its name in the user's model."""

    path: str
    tensor: Tensor
    sources: tuple[Node, ...]
    write: Write


@dataclass(frozen=True)
class Site:
    """An attention over a cache."""

    attention: Node
    k: Held
    v: Held


def sites(gm: GraphModule) -> Iterator[tuple[Node, Site | Miss, tuple[str, str]]]:
    """(attention, what it reads, paths of its buffers) for each attention over buffers that the graph writes
    to."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        roots = [_root(node.args[i]) for i in (1, 2)]
        k, v = roots
        if k is None or v is None or not {_name(k), _name(v)} <= mutated(gm):
            continue
        paths = _path(gm, k), _path(gm, v)
        yield node, _site(gm, node, k, v, order), paths


def _site(gm: GraphModule, node: Node, k: Node, v: Node, order: dict[Node, int]) -> Site | Miss:
    if k.target == v.target and k.op == v.op:
        return Miss("keys and values are one buffer")
    found = []
    for root in (k, v):
        held = _held(gm, node, root, order)
        if isinstance(held, Miss):
            return held
        found.append(held)
    first, second = (held.write for held in found)
    if first.positions != second.positions:
        return Miss("keys and values are written at positions of their own")
    if first.value.meta["val"].shape != second.value.meta["val"].shape:
        return Miss("keys and values are not of one shape")
    return Site(node, found[0], found[1])


def unrepeated(operand: Any) -> tuple[Any, int]:
    """(the tensor before its heads were repeated, how often): repeat_interleave, or unsqueeze and expand."""
    while isinstance(operand, Node) and operand.target in _SAME:
        operand = operand.args[0]
    if not isinstance(operand, Node):
        return operand, 1
    if operand.target is aten.repeat_interleave.self_int and argument(operand, "dim") in (1, -3):
        return operand.args[0], int(operand.args[1])  # type: ignore[arg-type]
    if operand.target in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        inner = operand.args[0]
        while isinstance(inner, Node) and inner.target in _SAME:
            inner = inner.args[0]
        if isinstance(inner, Node) and inner.target is aten.expand.default:
            middle = inner.args[0]
            if (
                isinstance(middle, Node)
                and middle.target is aten.unsqueeze.default
                and middle.args[1] in (2, -3)
            ):
                base: Any = middle.args[0]
                shape, wide = base.meta["val"].shape, inner.meta["val"].shape
                times = wide[2]
                if tuple(operand.meta["val"].shape) == (shape[0], shape[1] * times, *shape[2:]):
                    return base, int(times)
    return operand, 1


def _root(operand: Any) -> Node | None:
    """The buffer behind an operand of the attention."""
    base, _ = unrepeated(operand)
    while isinstance(base, Node) and base.target in (*_INDEXED, *_COPIED, *_NEW):
        base = base.args[0]
    return base if isinstance(base, Node) and base.op in ("get_attr", "placeholder") else None


def _name(root: Node) -> str:
    return str(root.target) if root.op == "get_attr" else root.name


def _path(gm: GraphModule, root: Node) -> str:
    here = state(gm)
    return (
        here.path(str(root.target)) if root.op == "get_attr" else here.param_paths.get(root.name, root.name)
    )


def _held(gm: GraphModule, node: Node, root: Node, order: dict[Node, int]) -> Held | Miss:
    path = _path(gm, root)
    tensor = (
        find_attribute(gm, str(root.target)) if root.op == "get_attr" else state(gm).params.get(root.name)
    )
    if not isinstance(tensor, Tensor) or tensor.ndim != 4:
        return Miss(f"{path} is no buffer [B, heads, tokens, numbers]")
    sources = (root,)
    if root.op == "get_attr":
        sources = tuple(gm.graph.find_nodes(op="get_attr", target=root.target))
    writes: list[Any] = []
    put_back: dict[Node, Node] = {}
    readers: list[Node] = []
    for use in [use for source in sources for use in source.users]:
        if use.target is aten.copy_.default and use.args[0] in sources and isinstance(use.args[1], Node):
            put_back[use.args[1]] = use
        elif use.target is aten.slice.Tensor:
            writes += [_sliced(use, copy) for copy in use.users]
        elif use.args and use.args[0] in sources and use.target in (*_INDEXED, *_COPIED, *_NEW):
            writes.append(_written(use))
            again = [
                user
                for user in use.users
                if user.args[0] is use and user.target in (*_INDEXED, *_COPIED, *_NEW)
            ]
            writes += [None] * len(again)
            readers += [user for user in use.users if user not in again]
        else:
            readers.append(use)
    if len(writes) != 1 or None in writes:
        return Miss(f"{path} is not written once, at positions along its third dimension")
    write = writes[0]
    last = write.nodes[-1]
    if last.target in _NEW:
        if last not in put_back:
            return Miss(f"what is written to {path} is not kept")
        write = Write(write.value, write.positions, (*write.nodes, put_back.pop(last)))
    readers = [use for use in readers if use not in write.nodes]
    if put_back or not all(_leads_to(use, node) for use in readers):
        return Miss(f"{path} is read by more than one attention, or by something else")
    if order[last] > order[node] or order[write.nodes[0]] > order[node]:
        return Miss(f"{path} is read before it is written")
    new = write.value.meta["val"]
    if new.dtype != tensor.dtype or tuple(new.shape[:2]) != tuple(tensor.shape[:2]) or new.ndim != 4:
        return Miss(f"what is written to {path} is broadcast or cast")
    return Held(path, tensor, sources, write)


def _leads_to(use: Node, node: Node) -> bool:
    """Whether a use of the buffer is the attention, or repeats heads for it and nothing else."""
    while use is not node:
        if len(use.users) != 1 or use.target not in _REPEATS:
            return False
        use = next(iter(use.users))
    return True


def _written(use: Node) -> Any:
    """A `Write` by index or by scattering a slice, None if it is another kind."""
    if use.target in _INDEXED:
        indices, value = use.args[1], use.args[2]
        plain = isinstance(indices, list | tuple) and len(indices) == 3 and tuple(indices[:2]) == (None, None)
        if not plain or argument(use, "accumulate", False) or not _one_dimension(indices[2]):  # type: ignore[index]
            return None
        return Write(value, indices[2], (use,))  # type: ignore[arg-type, index]
    if use.target in _COPIED:
        _, dim, index, value = use.args
        return Write(value, index, (use,)) if dim in (2, -2) and _one_dimension(index) else None  # type: ignore[arg-type]
    value = use.args[1]
    span = _span(use, value)
    return None if span is None else Write(value, span, (use,))  # type: ignore[arg-type]


def _one_dimension(index: Any) -> bool:
    return (
        isinstance(index, Node)
        and index.meta["val"].ndim == 1
        and not index.meta["val"].dtype.is_floating_point
    )


def _sliced(cut: Node, copy: Node) -> Any:
    """A `Write` by `copy_` to a slice."""
    if copy.target is not aten.copy_.default or copy.args[0] is not cut or copy.users:
        return None
    value = copy.args[1]
    span = _span(cut, value)
    return None if span is None else Write(value, span, (cut, copy))  # type: ignore[arg-type]


def _span(node: Node, value: Any) -> tuple[int, int] | None:
    """Which tokens a slice means, if they are numbers known now."""
    dim, start, step = argument(node, "dim", 0), argument(node, "start", 0) or 0, argument(node, "step", 1)
    if dim not in (2, -2) or step != 1 or not isinstance(start, int) or not isinstance(value, Node):
        return None
    base: Any = node.args[0]
    count, tokens = value.meta["val"].shape[2], base.meta["val"].shape[2]
    if not isinstance(count, int) or not isinstance(tokens, int):
        return None
    start = start + tokens if start < 0 else start
    end = argument(node, "end")
    end = tokens if end is None else end
    if not isinstance(end, int):
        return None
    end = min(end + tokens if end < 0 else end, tokens)
    return (start, end) if end - start == count else None
