"""Chain: what stands between two convolutions in codes becomes part of the first one's kernel.

In: a graph on `bitfold.conv`, its regions put back. Out: the same, in which batch norm with running
statistics, pointwise operations, a residual and the `quantize` of whoever reads the result next are in the
kernel's text, so that activations stay codes from kernel to kernel.

    %y = conv([%c, ..], "conv 64x32x3x3 ..")[0];  %b = batch_norm(%y, ..);  %z = relu(add(%b, %r))
    %q = quantize(%z, "int8[tensor]", [%s]);      %o = conv([%q[0], ..], ..);   %p = add(.., %z)
    ->  %k = conv([%c, .., %r, %v0, %v1, %s],
                  "conv 64x32x3x3 .. -> relu(add(add(mul(y0,v0),v1),e0)) e:f32 y:f32 y:int8[tensor]")
        %z = %k[0];  %o = conv([%k[1], ..], ..);  %p = add(.., %z)

A result that is read as a float too is written twice: codes never take the place of a number that the
folded graph computes with. Where codes cannot be negative, the kernel that reads them is told.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...codegen import CodegenError
from ...codegen.conv import ConvSpec, has_zero
from ...codegen.epilogue import Apply, Epilogue, Expression
from ...formats import Format, format
from ...passes import inherit
from ...passes.edges import epochs
from ...passes.edit import arguments, call
from ..out_of_place import out_of_place
from ..splice import operation, same_shape
from .conv import parsed
from .moved_codes import move_codes, scales_of, static
from .pads import take_pads
from .signs import not_negative

aten = torch.ops.aten
CONV = torch.ops.bitfold.conv.default


@dataclass(frozen=True)
class _Draft:
    """A result that could be a kernel's: its call, the expression on its sums, what else is read (e0 .., v0
    ..), and the last node that it takes the place of."""

    call: Node
    root: Expression
    reads: tuple[Node, ...]
    vectors: tuple[Node, ...]
    last: Node

    @property
    def spec(self) -> ConvSpec:
        """Of its call."""
        return parsed(str(self.call.args[1]))


def chain(gm: GraphModule) -> int:
    """Number of kernels that took something in."""
    if not gm.graph.find_nodes(op="call_function", target=CONV):
        return 0
    _in_any_order(gm.graph)
    out_of_place(gm)
    take_pads(gm)
    move_codes(gm)
    since = epochs(gm)
    positive = not_negative(gm)
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    drafts: dict[Node, _Draft] = {}
    for node in list(gm.graph.nodes):
        draft = _first(node) or _grown(gm, node, drafts, since, places)
        if draft is not None:
            drafts[node] = draft
    # Of each call the last draft, which holds those before it.
    last = {draft.call: draft for draft in drafts.values()}
    # By the place of their calls, so that what a kernel reads of another is there.
    written = dict[Node, Node]()
    found = sum(_write(gm.graph, draft, since, positive, written) for draft in last.values())
    _tell_signs(gm.graph, positive)
    gm.graph.eliminate_dead_code()
    return found


def _in_any_order(graph: Graph) -> None:
    """Results of kernels have their channels innermost, wherever they are read; only what leaves the graph
    lies as it did."""
    for node in graph.find_nodes(op="call_function", target=aten.contiguous.default):
        source = node.args[0]
        if source.target is operator.getitem and source.args[0].target is CONV and not node.kwargs:
            source.meta["val"] = node.meta["val"]  # as its readers expect it to lie
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    output = graph.output_node()
    with graph.inserting_before(output):
        for node in output.all_input_nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and node.op == "call_function" and _in_order(value):
                new = graph.call_function(aten.contiguous.default, (node,))
                new.meta["val"] = value
                output.replace_input_with(node, inherit(new, [node]))


def _in_order(value: Tensor) -> bool:
    """Whether three dimensions or more lie one behind the other, as far as is known."""
    known = all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    return value.ndim > 2 and (not known or value.is_contiguous())


def _first(node: Node) -> _Draft | None:
    """A kernel's result that has no epilogue yet."""
    call = node.args[0] if node.target is operator.getitem else None
    if not isinstance(call, Node) or call.target is not CONV:
        return None
    spec = parsed(str(call.args[1]))
    return _Draft(call, "y0", (), (), node) if spec == spec.plain() else None


def _grown(
    gm: GraphModule, node: Node, drafts: dict[Node, _Draft], since: dict[Node, int], places: dict[Node, int]
) -> _Draft | None:
    """The draft of an operation on a draft that nothing else reads: of the last one, if on two."""
    told = _normed(node) or _pointwise(node)
    if told is None:
        return None
    name, operands = told
    given = {operand for operand in operands if isinstance(operand, Node) and operand in drafts}
    ready = [operand for operand in given if _open(operand, node, drafts[operand], since)]
    if not ready:
        return None
    taken = max(ready, key=lambda operand: places[drafts[operand].call])
    draft = drafts[taken]
    if name == "batch_norm":
        return _with_norm(gm, node, draft)
    reads, terms = list(draft.reads), list[Expression]()
    for operand in operands:
        if isinstance(operand, float):
            terms.append(operand)
        elif operand is taken:
            terms.append(draft.root)
        elif not _readable(operand, node):
            return None
        else:
            reads += [operand] if operand not in reads else []
            terms.append(f"e{reads.index(operand)}")
    return replace(draft, root=Apply(name, tuple(terms)), reads=tuple(reads), last=node)


def _open(result: Node, user: Node, draft: _Draft, since: dict[Node, int]) -> bool:
    """Whether `user` is all that reads a result, of the same shape and type, with no write in between."""
    return set(result.users) == {user} and _readable(result, user) and since[user] == since[draft.call]


def _readable(operand: Node, user: Node) -> bool:
    """Whether a kernel that computes `user` may read `operand`, number by number."""
    ours, theirs = user.meta.get("val"), operand.meta.get("val")
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return False
    return ours.dtype == theirs.dtype == torch.float32 and same_shape(ours.shape, theirs.shape)


def _pointwise(node: Node) -> tuple[str, list[Node | float]] | None:
    """(name, operands) of an operation that an epilogue has."""
    if node.target is aten.relu6.default:
        return "clamp", [node.all_input_nodes[0], 0.0, 6.0]
    if node.target is aten.hardtanh.default:
        x, low, high = arguments(node)
        return "clamp", [x, float(low), float(high)]
    return operation(node)


def _normed(node: Node) -> tuple[str, list[Node | float]] | None:
    """A batch norm by running statistics."""
    if node.target is not aten.batch_norm.default:
        return None
    x, _, _, mean, var, training, *_ = arguments(node)
    return None if training or mean is None or var is None else ("batch_norm", [x])


def _with_norm(gm: GraphModule, node: Node, draft: _Draft) -> _Draft | None:
    """y v0 + v1, where v0 = weight / sqrt(var + eps) and v1 = bias - mean v0, two numbers a channel."""
    if not draft.spec.kernel and node.meta["val"].ndim != 2:
        return None  # its channels are not the product's columns
    _, weight, bias, mean, var, _, _, eps, _ = arguments(node)
    if any(
        given is not None and given.meta["val"].dtype != torch.float32 for given in (weight, bias, mean, var)
    ):
        return None

    def make(target: Any, *args: Any) -> Node:
        return call(gm, target, args, before=node, origin_from=node)

    scale = make(aten.rsqrt.default, make(aten.add.Tensor, var, eps))
    scale = scale if weight is None else make(aten.mul.Tensor, scale, weight)
    shift = make(aten.mul.Tensor, mean, scale)
    shift = make(aten.neg.default, shift) if bias is None else make(aten.sub.Tensor, bias, shift)
    at = len(draft.vectors)
    scaled = Apply("mul", (draft.root, f"v{at}"))
    return replace(
        draft,
        root=Apply("add", (scaled, f"v{at + 1}")),
        vectors=(*draft.vectors, scale, shift),
        last=node,
    )


def _write(
    graph: Graph, draft: _Draft, since: dict[Node, int], positive: set[Node], written: dict[Node, Node]
) -> bool:
    """The kernel in the place of the last operation; False if it would be what it was, or too large. written:
    results of kernels that were there before, and the new ones."""
    result = draft.last
    coded = [user for user in result.users if (static(user) and since[user] == since[result])]
    formats: list[Format | None] = [format(str(user.args[1])) for user in coded]
    if set(result.users) != set(coded):
        formats.insert(0, None)
    if draft.root == "y0" and not coded:
        return False
    reads: tuple[None, ...] = (None,) * len(draft.reads)
    epilogue = Epilogue(draft.root)
    try:
        spec = replace(draft.spec, epilogue=epilogue, reads=reads, writes=tuple(formats))
    except CodegenError:
        return False
    given: Any = draft.call.args[0]
    with graph.inserting_before(result):
        steps = [_at_hand(graph, one) for user in coded for one in scales_of(user)]
        reads_now = [written.get(read, read) for read in draft.reads]
        inputs = [*given, *reads_now, *draft.vectors, *steps]
        made = graph.call_function(CONV, (inputs, str(spec)))
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(len(formats))]
    value = result.meta["val"]
    codes = value.to(torch.uint8)
    made.meta["val"] = [value if f is None else codes for f in formats]
    for part, one in zip(parts, made.meta["val"], strict=True):
        part.meta["val"] = one
    for new in (made, *parts):
        inherit(new, [draft.call, result])
    first = len(parts) - len(coded)
    for user, part, f in zip(coded, parts[first:], formats[first:], strict=True):
        for piece in list(user.users):  # the scales were taken care of
            piece.replace_all_uses_with(part)
        if result in positive and not has_zero(f):
            positive.add(part)
    if formats[0] is None:
        written[result] = parts[0]
        result.replace_all_uses_with(parts[0], delete_user_cb=lambda user: user not in coded)
    return True


def _at_hand(graph: Graph, scale: Node) -> Node:
    """A scale or a zero point, which may be read further up."""
    if scale.op == "placeholder":
        return scale
    new = graph.get_attr(str(scale.target))
    new.meta.update(scale.meta)
    return new


def _tell_signs(graph: Graph, positive: set[Node]) -> None:
    """Kernels whose x has no negative codes are told so."""
    for node in graph.find_nodes(op="call_function", target=CONV):
        inputs, text = node.args
        if inputs[0] in positive:
            node.args = (inputs, str(replace(parsed(str(text)), positive=True)))
