"""Fuse: outline each quantized matmul, convolution, attention or embedding with what belongs around it.

In: a folded graph. Out: the same graph in which each anchor, the `dequantize` of its operands, the
`quantize` of an activation that only it reads (prologue) and the pointwise operations that only its result
goes through (epilogue) are one `call_module` of a small GraphModule. A target lowers such a region as a
whole. Constants come in as inputs.

    %w = dequantize([%c, %s], ..); %y = linear(%x, %w, %b); %z = relu(%y); %o = add(%z, %x)
    ->  %o = call_module[fused_fc](%x, %c, %s, %b)

A region is convex without a search: every node of it but the last is read inside it only, so no path can
leave it and come back. The last node's place is the region's: all inputs stand before it, all readers after
it, and nothing in between writes to a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .anchors import TARGETS
from .core import Pass
from .edges import epochs
from .edit import free_name
from .fold import DEQUANTIZE, QUANTIZE
from .note import KEY, note
from .provenance import inherit
from .stages import Stage, find_attribute

aten = torch.ops.aten
REGION = "bitfold_region"
"""In the `meta` of a region's GraphModule: its `Region`."""

# target -> (kind, operands that may be dequantized)
ANCHORS: dict[object, tuple[str, tuple[int, ...]]] = {
    **{target: (kind, (x, w)) for target, (kind, x, w) in TARGETS.items()},
    aten.mm.default: ("matmul", (0, 1)),
    aten.addmm.default: ("matmul", (1, 2)),
    aten.scaled_dot_product_attention.default: ("attention", (0, 1, 2)),
}
# What may stand between a dequantize and its anchor.
VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.unflatten.int,
        aten.flatten.using_ints,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.contiguous.default,
        aten.to.dtype,
    }
)
# What a kernel can do to its result before it is written.
EPILOGUE = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
        aten.clamp.default,
        aten.neg.default,
        aten.to.dtype,
    }
)


@dataclass(frozen=True)
class Region:
    """What a region holds: the anchor's kind, the formats of its operands, the ops around the anchor."""

    anchor: str
    formats: tuple[str, ...]
    prologue: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fuse(Pass):
    """epilogue: whether pointwise operations after the anchor join its region."""

    name: ClassVar[str] = "fuse"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.folded,)
    produces: ClassVar[Stage | None] = Stage.fused

    epilogue: bool = True

    def apply(self, gm: GraphModule) -> int:
        """Number of regions outlined."""
        nodes = list(gm.graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        since, taken = epochs(gm), set[Node]()
        regions = 0
        for node in nodes:
            if node in taken or node.target not in ANCHORS:
                continue
            operands = _operands(node)
            if not operands:
                continue
            prologue = [part for operand in operands for part in _prologue(operand, node, since)]
            tail = list(_epilogue(node, taken, since)) if self.epilogue else []
            inside = sorted({*operands, *prologue, node, *tail}, key=place.__getitem__)
            taken.update(part for part in inside if part not in operands)
            _outline(gm, node, inside, tail)
            regions += 1
        return regions


def inline(gm: GraphModule) -> int:
    """Put every outlined region back into the graph; return how many there were."""
    regions = 0
    for call in list(gm.graph.nodes):
        body = region_of(gm, call)
        if body is None:
            continue
        values = dict(zip(body.graph.find_nodes(op="placeholder"), call.args, strict=True))
        with gm.graph.inserting_before(call):
            result = gm.graph.graph_copy(body.graph, values)
        assert isinstance(result, Node)
        call.replace_all_uses_with(result)
        gm.graph.erase_node(call)
        gm.delete_submodule(str(call.target))
        regions += 1
    return regions


def region_of(gm: GraphModule, node: Node) -> GraphModule | None:
    """The body of the outlined region that `node` calls, or None."""
    if node.op != "call_module":
        return None
    found = find_attribute(gm, str(node.target))
    return found if isinstance(found, GraphModule) and REGION in found.meta else None


def _operands(anchor: Node) -> list[Node]:
    """The dequantize nodes that feed `anchor`, each with the views between the two."""
    found: list[Node] = []
    for index in ANCHORS[anchor.target][1]:
        chain: list[Node] = []
        step = anchor.args[index] if index < len(anchor.args) else None
        while isinstance(step, Node) and step.target in VIEWS:
            chain.append(step)
            step = step.args[0]
        if isinstance(step, Node) and step.target is DEQUANTIZE:
            found += [step, *reversed(chain)]
    return list(dict.fromkeys(found))


def _prologue(operand: Node, anchor: Node, since: dict[Node, int]) -> list[Node]:
    """The quantize behind `operand` and its parts, if nothing but this anchor reads them."""
    if operand.target is not DEQUANTIZE or set(operand.users) != {anchor}:
        return []
    parts = [part for part in operand.all_input_nodes if part.target is operator.getitem]
    sources = {part.args[0] for part in parts}
    if len(sources) != 1:
        return []
    (source,) = sources
    assert isinstance(source, Node)
    alone = source.target is QUANTIZE and set(source.users) == set(parts)
    if not alone or since[source] != since[anchor] or any(set(part.users) != {operand} for part in parts):
        return []
    return [source, *parts]


def _epilogue(anchor: Node, taken: set[Node], since: dict[Node, int]) -> Iterator[Node]:
    """The chain of pointwise operations that only the anchor's result goes through."""
    last = anchor
    while len(last.users) == 1:
        (user,) = last.users
        if (
            user in taken
            or user.target not in EPILOGUE
            or since[user] != since[anchor]
            or not _same_shape(user, last)
        ):
            return
        yield user
        last = user


def _same_shape(user: Node, last: Node) -> bool:
    ours, theirs = last.meta.get("val"), user.meta.get("val")
    return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape


def _outline(gm: GraphModule, anchor: Node, inside: list[Node], tail: list[Node]) -> None:
    """Move `inside` into a GraphModule and call it where its last node stood."""
    last = (tail or [anchor])[-1]
    inputs = _inputs([anchor, *tail], set(inside))
    graph = Graph()
    copies: dict[Node, Node] = {}
    for source in inputs:
        copies[source] = graph.placeholder(source.name)
        copies[source].meta.update(_carried(source))
    for part in inside:
        copies[part] = graph.node_copy(part, copies.__getitem__)
    graph.output(copies[last]).meta["val"] = last.meta["val"]
    found = note(anchor)
    body = GraphModule(nn.Module(), graph, class_name="Region")
    body.meta[REGION] = _region(anchor, inside, tail)
    name = free_name(gm, f"fused_{found.layer if found else anchor.name}")
    gm.add_submodule(name, body)
    with gm.graph.inserting_before(last):
        call = gm.graph.create_node("call_module", name, tuple(inputs), {}, name=name)
    call.meta["val"] = last.meta["val"]
    if found:
        call.meta[KEY] = found
    inherit(call, [anchor, *inside])
    last.replace_all_uses_with(call)
    for part in reversed(inside):
        # An operand that another anchor reads too was copied, and stays for that one.
        if not part.users:
            gm.graph.erase_node(part)


def _inputs(outer: list[Node], inside: set[Node]) -> list[Node]:
    """What a region reads from outside, in the order of the anchor's arguments, then of the epilogue's."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        for source in node.all_input_nodes:
            if source not in inside:
                found.setdefault(source)
            elif source not in seen:
                seen.add(source)
                visit(source)

    for node in outer:
        visit(node)
    return list(found)


def _carried(source: Node) -> dict[str, object]:
    return {
        "val": source.meta["val"],
        **({"tensor_meta": m} if (m := source.meta.get("tensor_meta")) else {}),
    }


def _region(anchor: Node, inside: list[Node], tail: list[Node]) -> Region:
    formats = tuple(str(part.args[1]) for part in inside if part.target is DEQUANTIZE)
    before = tuple(_name(part) for part in inside if part.target is QUANTIZE)
    return Region(ANCHORS[anchor.target][0], formats, before, tuple(map(_name, tail)))


def _name(node: Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else node.name
