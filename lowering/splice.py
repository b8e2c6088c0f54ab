"""Splice: pointwise operations around kernels become part of them.

In: a graph on `bitfold.fused`. Out: the same with the operations that only a kernel's result goes through in
the kernel's text, and with two kernels of one x, whose results meet in such an operation, as one.

    %g = fused([%x, ..], "linear 96x64 bf16 int8[..]")[0];  %u = the same with other codes
    %s = silu(%g);  %h = mul(%s, %u)
    ->  %h = fused([%x, .., ..], "linear 96x64 bf16 2*int8[..] -> mul(silu(y0),y1)")[0]

What else an operation reads is an input of the kernel: a tensor of the result's shape (a residual), or one
number for each column. The kernel stands where the last operation stood, so all it reads is there; nothing is
moved past an operator that writes to a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..codegen import CodegenError, GemmSpec
from ..codegen.epilogue import Apply, Epilogue, Expression
from ..codegen.spec import MOST_EXTRAS, MOST_WEIGHTS
from ..passes import inherit
from ..passes.edges import epochs
from .fused import parsed

aten = torch.ops.aten
FUSED = torch.ops.bitfold.fused.default
DEQUANTIZE = torch.ops.bitfold.dequantize.default
QUANTIZE = torch.ops.bitfold.quantize.default

# aten operator -> what an epilogue calls it, for operators whose arguments are the operands in order.
POINTWISE: dict[object, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.neg.default: "neg",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
    aten.gelu.default: "gelu",
    aten.hardswish.default: "hardswish",
    aten.leaky_relu.default: "leaky_relu",
    aten.clamp.default: "clamp",
}
_INVERSE = {name: target for target, name in POINTWISE.items()}


@dataclass(frozen=True)
class _Draft:
    """A result that could be a kernel's: the kernels it needs, the expression on their sums, what else is
    read (nodes for e0 .. and v0 ..), and the nodes that it would take the place of."""

    calls: tuple[Node, ...]
    root: Expression
    matrices: tuple[Node, ...]
    vectors: tuple[Node, ...]
    covers: tuple[Node, ...]

    @property
    def spec(self) -> GemmSpec:
        return parsed(str(self.calls[0].args[1]))

    @property
    def extras(self) -> int:
        return len(self.matrices) + len(self.vectors)


def splice(gm: GraphModule) -> int:
    """Number of kernels that took something in."""
    since = epochs(gm)
    _quantized_once(gm.graph, since)
    drafts: dict[Node, _Draft] = {}
    for node in gm.graph.nodes:
        draft = _first(node) or _grown(node, drafts, since)
        if draft is not None:
            drafts[node] = draft
    found, done = 0, set[Node]()
    # A later draft takes in what the earlier ones under it would have.
    for node in reversed(list(drafts)):
        draft = drafts[node]
        if node in done or draft.root == "y0":
            continue
        done.update(draft.covers)
        found += _write(gm.graph, node, draft)
    if found:
        gm.graph.eliminate_dead_code()
    return found


def _quantized_once(graph: Graph, since: dict[Node, int]) -> None:
    """One `quantize` for all readers of an x, which modules that were folded one by one each have made."""
    made: dict[tuple[object, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=QUANTIZE):
        if len(node.args) != 2 or node.kwargs:
            continue
        first = made.setdefault((*node.args, since[node]), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _first(node: Node) -> _Draft | None:
    """A kernel's result that has no epilogue yet."""
    if node.target is not operator.getitem:
        return None
    call = node.args[0]
    if not isinstance(call, Node) or call.target is not FUSED or not parsed(str(call.args[1])).epilogue.plain:
        return None
    return _Draft((call,), "y0", (), (), (node,))


def _grown(node: Node, drafts: dict[Node, _Draft], since: dict[Node, int]) -> _Draft | None:
    """The draft of a pointwise operation on at least one draft."""
    found = operation(node)
    if found is None:
        return None
    name, operands = found
    taken: _Draft | None = None
    places: dict[Node, Expression] = {}
    for operand in operands:
        given = drafts.get(operand) if isinstance(operand, Node) else None
        if given is None or isinstance(operand, float) or not _open(operand, node, given, since):
            continue
        if taken is None:
            taken, places = given, {operand: given.root}
        elif operand not in places:
            joined = _joined(taken, given)
            if joined is not None:
                taken, root = joined
                places[operand] = root
    if taken is None:
        return None
    return _applied(node, name, operands, places, taken)


def _open(result: Node, user: Node, draft: _Draft, since: dict[Node, int]) -> bool:
    """Whether `user` is all that reads a result, of the same shape and type, with no write in between."""
    ours, theirs = user.meta.get("val"), result.meta.get("val")
    if set(result.users) != {user} or not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return False
    alike = ours.dtype == theirs.dtype and same_shape(ours.shape, theirs.shape)
    return alike and since[user] == since[draft.calls[0]]


def same_shape(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes are known to be one, with no guard put on sizes that vary."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _joined(first: _Draft, second: _Draft) -> tuple[_Draft, Expression] | None:
    """Both as one kernel, and the second's expression in it; None if they are no kernels of one x."""
    mine, other = first.spec, second.spec
    if mine != other or len(first.calls) + len(second.calls) > MOST_WEIGHTS:
        return None
    if first.extras + second.extras > MOST_EXTRAS:
        return None
    if not all(map(_same, _of_x(first.calls[0], mine), _of_x(second.calls[0], mine))):
        return None
    moved = {
        "y": len(first.calls),
        "e": len(first.matrices),
        "v": len(first.vectors),
    }
    draft = _Draft(
        first.calls + second.calls,
        first.root,
        first.matrices + second.matrices,
        first.vectors + second.vectors,
        first.covers + second.covers,
    )
    return draft, _renamed(second.root, moved)


def _renamed(of: Expression, moved: dict[str, int]) -> Expression:
    if isinstance(of, Apply):
        return Apply(of.op, tuple(_renamed(operand, moved) for operand in of.operands))
    return f"{of[0]}{int(of[1:]) + moved[of[0]]}" if isinstance(of, str) else of


def _of_x(call: Node, spec: GemmSpec) -> list[Any]:
    """x, its scales if it comes in codes, and where each expert's rows end."""
    inputs = call.args[0]
    assert isinstance(inputs, list | tuple)
    return list(inputs[: 1 + (spec.activation is not None) + bool(spec.experts)])


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes are one value: the same node, the same part, or the same codes decoded twice."""
    return a is b or (
        a.target is b.target and a.target in (DEQUANTIZE, operator.getitem) and a.args == b.args
    )


def _applied(
    node: Node, name: str, operands: list[Node | float], places: dict[Node, Expression], taken: _Draft
) -> _Draft | None:
    matrices, vectors = list(taken.matrices), list(taken.vectors)
    terms: list[Expression] = []
    for operand in operands:
        if isinstance(operand, float):
            terms.append(operand)
        elif operand in places:
            terms.append(places[operand])
        else:
            held = _held(operand, node, taken.spec, matrices, vectors)
            if held is None:
                return None
            terms.append(held)
    if len(matrices) + len(vectors) > MOST_EXTRAS:
        return None
    covers = (*taken.covers, node)
    return _Draft(taken.calls, Apply(name, tuple(terms)), tuple(matrices), tuple(vectors), covers)


def _held(operand: Node, user: Node, spec: GemmSpec, matrices: list[Node], vectors: list[Node]) -> str | None:
    """What another operand is called in the epilogue; it becomes an input."""
    value, result = operand.meta.get("val"), user.meta["val"]
    if not isinstance(value, Tensor) or value.dtype != spec.dtype:
        return None
    if result.ndim > 0 and same_shape(value.shape, result.shape):
        kind, found = "e", matrices
    elif spec.n > 1 and not spec.experts and same_shape(value.shape, (spec.n,)):
        kind, found = "v", vectors
    else:
        return None
    if operand not in found:
        found.append(operand)
    return f"{kind}{found.index(operand)}"


def operation(node: Node) -> tuple[str, list[Node | float]] | None:
    """(name, operands) of a pointwise operation that an epilogue has."""
    if node.op != "call_function" or node.target not in POINTWISE:
        return None
    name, arguments = POINTWISE[node.target], list(node.args)
    options = dict(node.kwargs)
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(options.pop("approximate", "none")), "")
    elif name in ("add", "sub") and options.get("alpha", 1) == 1:
        options.pop("alpha", None)
    elif name == "leaky_relu":
        arguments = [*arguments, 0.01][:2]
    elif name == "clamp":
        low, high = [*arguments[1:], None, None][:2]
        arguments = [
            arguments[0],
            -float("inf") if low is None else low,
            float("inf") if high is None else high,
        ]
    if options or not name:
        return None
    operands: list[Node | float] = []
    for argument in arguments:
        if isinstance(argument, Node) and isinstance(argument.meta.get("val"), Tensor):
            operands.append(argument)
        elif isinstance(argument, int | float):
            operands.append(float(argument))
        else:
            return None
    return name, operands


def _write(graph: Graph, node: Node, draft: _Draft) -> bool:
    """The kernel in the place of its last operation; False if no kernel is that large."""
    spec = draft.spec
    calls: list[Any] = [call.args[0] for call in draft.calls]
    first, each = len(_of_x(draft.calls[0], spec)), len(spec.weight.parts)
    inputs: list[Any] = [*calls[0][:first]]
    for given in calls:
        inputs += given[first : first + each]
    for given in calls:
        inputs += given[first + each :]
    inputs += [*draft.matrices, *draft.vectors]
    try:
        wanted = replace(spec, weights=len(calls), epilogue=Epilogue(draft.root))
    except CodegenError:
        return False
    with graph.inserting_before(node):
        call = graph.call_function(FUSED, (inputs, str(wanted)))
        result = graph.call_function(operator.getitem, (call, 0))
    call.meta["val"], result.meta["val"] = [node.meta["val"]], node.meta["val"]
    for made in (call, result):
        inherit(made, [*draft.calls, *draft.covers])
    node.replace_all_uses_with(result)
    return True


def expanded(graph: Graph, call: Node, dtype: torch.dtype) -> None:
    """A call of the operator as the operators that it stands for, on activations of `dtype`."""
    spec = parsed(str(call.args[1]))
    given: Any = spec.inputs(call.args[0])  # type: ignore[arg-type]
    (result,) = call.users
    with graph.inserting_before(call):
        x = given.x
        if spec.activation is not None:
            x = graph.call_function(DEQUANTIZE, ([x, given.x_scales], str(spec.activation), spec.k, dtype))
        names: dict[str, Any] = {}
        for i, parts in enumerate(given.parts):
            weight = graph.call_function(DEQUANTIZE, (list(parts), str(spec.weight), spec.k, dtype))
            if spec.experts:
                swapped = graph.call_function(aten.transpose.int, (weight, -2, -1))
                names[f"y{i}"] = graph.call_function(aten._grouped_mm.default, (x, swapped, given.ends))
            else:
                bias = given.biases[i : i + 1]
                names[f"y{i}"] = graph.call_function(aten.linear.default, (x, weight, *bias))
        matrices = spec.epilogue.count("e")
        names |= {f"e{i}": node for i, node in enumerate(given.extras[:matrices])}
        names |= {f"v{i}": node for i, node in enumerate(given.extras[matrices:])}
        y = _calls(graph, spec.epilogue.root, names)
    result.replace_all_uses_with(y)
    graph.erase_node(result)
    graph.erase_node(call)


def _calls(graph: Graph, of: Expression, names: dict[str, Any]) -> Any:
    if not isinstance(of, Apply):
        return names[of] if isinstance(of, str) else of
    operands = [_calls(graph, operand, names) for operand in of.operands]
    if of.op == "gelu_tanh":
        return graph.call_function(aten.gelu.default, tuple(operands), {"approximate": "tanh"})
    return graph.call_function(_INVERSE[of.op], tuple(operands))  # type: ignore[arg-type]
