"""Normalize: a linear layer in all its dresses becomes one node, `aten.linear(x, w, b)`.

Comes in: a captured graph. Goes out: the same function, where every product of an activation with a constant
matrix is `aten.linear.default` with `w` an expression of the parameter, [N, K]; nodes that do nothing are
gone.

    x @ w                      ->  linear(x, t(w))
    addmm(b, x, t(w))          ->  linear(x, w, b)
    einsum('bij,kj->bik', x, w) -> linear(x, w)

A `bmm` with a constant weight stays what it is: its weight has a batch. What has a constant weight and could
not be brought to `linear` is reported with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from .cleanup import erase_dead_nodes
from .constants import constant_nodes, expression
from .core import Miss, Pass, report
from .edit import argument, call, replace
from .einsum import einsum_as_linear, tensordot_equation
from .scopes.flatten import inline_no_grad
from .stages import Stage, operator_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalize(Pass):
    """Bring products with constant matrices to `aten.linear`, and drop what does nothing."""

    name: ClassVar[str] = "normalize"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = (Stage.captured,)
    produces: ClassVar[Stage | None] = None

    def apply(self, gm: GraphModule) -> int:
        rewrites = inline_no_grad(gm)
        constants = constant_nodes(gm)
        # A model that trains may stop a gradient with detach(); one that cannot train has none to stop.
        trains = any(p.requires_grad for p in gm.parameters())
        for node in list(gm.graph.nodes):
            if _does_nothing(node, trains):
                rewrites += _drop(node)
                continue
            if isinstance(node.target, HigherOrderOperator):
                _report_hidden(gm, node)
            rule = _RULES.get(node.target)
            if rule is None:
                continue
            result = rule(gm, node, constants)
            if isinstance(result, Node):
                replace(node, result)
                rewrites += 1
            elif result is not None and _is_about_weights(gm, node, constants):
                report(gm, node, result, asked="aten.linear")
        erase_dead_nodes(gm)
        return rewrites


def _report_hidden(gm: GraphModule, node: Node) -> None:
    """Say of each weight that goes into a block (a `cond`, a loop) that no pass looks inside."""
    block = operator_name(node.target).removeprefix("higher_order::")
    for source in node.all_input_nodes:
        found = expression(gm, source)
        if found is not None and isinstance(found.parameter, nn.Parameter) and found.parameter.dim() > 1:
            miss = Miss(f"the weight '{found.path}' is used inside a '{block}' block, which stays as it is")
            report(gm, node, miss, asked="aten.linear")


def _is_about_weights(gm: GraphModule, node: Node, constants: set[Node]) -> bool:
    """Whether a parameter goes into the product; a table of frequencies or a mask is nothing to report."""
    found = [expression(gm, source) for source in node.all_input_nodes if source in constants]
    return any(known is not None and isinstance(known.parameter, nn.Parameter) for known in found)


def _does_nothing(node: Node, trains: bool) -> bool:
    if node.op == "call_module":
        return node.target == "_guards_fn"
    if node.target in (aten.alias.default, aten._assert_tensor_metadata.default):
        return True
    if node.target is aten.detach.default:
        return not trains
    if node.target is aten.slice.Tensor:
        return _takes_all(node)
    return node.target in _CASTS and _casts_to_itself(node)


def _takes_all(node: Node) -> bool:
    """`x[:]`, from 0 to the largest index in steps of 1: what `x[:, None]` leaves of its first part."""
    start, end = argument(node, "start", 0), argument(node, "end")
    return start in (0, None) and (end is None or end == sys.maxsize) and argument(node, "step", 1) == 1


_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default)


def _casts_to_itself(node: Node) -> bool:
    """`x.to(dtype)` without copy where x has that dtype and device already returns x itself."""
    source = node.args[0]
    copies = argument(node, "copy") or argument(node, "memory_format") is not None
    if copies or not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device


def _drop(node: Node) -> int:
    if node.users:
        source = node.args[0]
        assert isinstance(source, Node)
        node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return 1


def transposed(gm: GraphModule, weight: Node, before: Node) -> Node:
    """`weight` with its two dimensions swapped; what was transposed already is only put back."""
    source = weight.args[0] if weight.args else None
    if isinstance(source, Node) and _is_transpose(weight):
        return source
    return call(gm, aten.t.default, (weight,), before=before, origin_from=before)


def _is_transpose(node: Node) -> bool:
    if rank(node) != 2:
        return False
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target is aten.transpose.int:
        first, second = (int(dim) % 2 for dim in node.args[1:3])  # type: ignore[arg-type]
        return first != second
    if node.target is not aten.permute.default:
        return False
    order: Any = node.args[1]
    return [int(dim) % 2 for dim in order] == [1, 0]


def rank(node: Node) -> int:
    """Number of dimensions of the node's value."""
    return int(node.meta["val"].dim())


Result = Node | Miss | None
"""A replacement; a reason why there is none; or None when the node is no product with a constant at all."""


def _matmul(gm: GraphModule, node: Node, constants: set[Node]) -> Result:
    left, right = node.args[:2]
    if (
        not isinstance(left, Node)
        or not isinstance(right, Node)
        or (left in constants) == (right in constants)
    ):
        return None
    if right in constants:
        return _times_constant(gm, node, left, right)
    return _constant_times(gm, node, left, right)


def _times_constant(gm: GraphModule, node: Node, x: Node, weight: Node) -> Result:
    if rank(weight) == 2:
        w = transposed(gm, weight, node)
        return call(gm, aten.linear.default, (x, w), before=node, origin_from=node)
    if rank(weight) == 1:
        return Miss("a product with a constant vector is no linear layer")
    # A constant with a batch of its own is an anchor as it is, like bmm.
    return None


def _constant_times(gm: GraphModule, node: Node, weight: Node, x: Node) -> Result:
    if rank(weight) == 1:
        return Miss("a product with a constant vector is no linear layer")
    if rank(weight) > 2:
        return Miss("a batch of constant matrices stands on the left of the product; write it on the right")
    if rank(x) == 1:
        return call(gm, aten.linear.default, (x, weight), before=node, origin_from=node)
    # w @ x = (x^T @ w^T)^T, and x^T @ w^T is linear(x^T, w)
    columns = call(gm, aten.transpose.int, (x, -2, -1), before=node, origin_from=node)
    rows = call(gm, aten.linear.default, (columns, weight), before=node, origin_from=node)
    return call(gm, aten.transpose.int, (rows, -2, -1), before=node, origin_from=node)


def _addmm(gm: GraphModule, node: Node, constants: set[Node]) -> Result:
    bias, x, weight = node.args[:3]
    if not isinstance(bias, Node) or not isinstance(x, Node) or not isinstance(weight, Node):
        return None
    if weight not in constants or x in constants:
        return None
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    w = transposed(gm, weight, node)
    whole = (
        beta == 1 and alpha == 1 and rank(bias) == 1 and bias.meta["val"].shape[0] == w.meta["val"].shape[0]
    )
    args: tuple[Any, ...] = (x, w, bias) if whole else (x, w)
    product = call(gm, aten.linear.default, args, before=node, origin_from=node)
    if whole:
        return product
    if alpha != 1:
        product = call(gm, aten.mul.Tensor, (product, alpha), before=node, origin_from=node)
    if beta == 0:
        return product
    if beta != 1:
        bias = call(gm, aten.mul.Tensor, (bias, beta), before=node, origin_from=node)
    return call(gm, aten.add.Tensor, (product, bias), before=node, origin_from=node)


def _einsum(gm: GraphModule, node: Node, constants: set[Node]) -> Result:
    equation, operands = node.args[0], cast(list[Node], node.args[1])
    if not any(operand in constants for operand in operands):
        return None
    return einsum_as_linear(gm, node, str(equation), list(operands), constants)


def _tensordot(gm: GraphModule, node: Node, constants: set[Node]) -> Result:
    left, right = cast(list[Node], node.args[:2])
    left_dims, right_dims = cast(list[list[int]], node.args[2:4])
    return _contraction(gm, node, left, right, left_dims, right_dims, constants)


def _inner(gm: GraphModule, node: Node, constants: set[Node]) -> Result:
    left, right = cast(list[Node], node.args[:2])
    if not (rank(left) and rank(right)):
        return None  # a multiplication by a number
    return _contraction(gm, node, left, right, [-1], [-1], constants)


def _contraction(
    gm: GraphModule,
    node: Node,
    left: Node,
    right: Node,
    left_dims: list[int],
    right_dims: list[int],
    constants: set[Node],
) -> Result:
    if not (left in constants or right in constants):
        return None
    equation = tensordot_equation(rank(left), rank(right), left_dims, right_dims)
    return einsum_as_linear(gm, node, equation, [left, right], constants)


_RULES: dict[Any, Callable[[GraphModule, Node, set[Node]], Result]] = {
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.addmm.default: _addmm,
    aten.einsum.default: _einsum,
    aten.tensordot.default: _tensordot,
    aten.inner.default: _inner,
}
