"""An einsum with one constant operand as `aten.linear`, and the equations of its cousins inner and tensordot.

Comes in: an `aten.einsum` node, its equation and operands. Goes out: the last of the nodes that compute the
same with `linear`, or a `Miss`.

    einsum('bsd,dhk->bshk', x, w)  ->  unflatten(linear(x, flatten(permute(w, [1, 2, 0]), 0, 1)), -1, [h, k])

Each index of the equation is either *contracted* (in both operands, not in the result), *kept* (of the
activation), or *new* (of the weight); an index in all three would be a batch, which a linear layer has not.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .core import Miss
from .edit import call

aten = torch.ops.aten


def einsum_as_linear(
    gm: GraphModule, node: Node, equation: str, operands: list[Node], constants: set[Node]
) -> Node | Miss | None:
    """The replacement; a Miss with the reason; None when every operand is constant."""
    if all(operand in constants for operand in operands):
        return None
    if len(operands) != 2:
        return Miss(f"the einsum '{equation}' has {len(operands)} operands; a linear layer has two")
    at = 1 if operands[1] in constants else 0
    x, weight = operands[1 - at], operands[at]
    spelled = _subscripts(equation, operands)
    if isinstance(spelled, Miss):
        return spelled
    (*terms, out) = spelled
    of_x, of_w = terms[1 - at], terms[at]
    reason = _obstacle(equation, of_x, of_w, out)
    if reason:
        return Miss(reason)
    contracted = [index for index in of_x if index in of_w]
    kept = [index for index in of_x if index not in of_w]
    new = [index for index in of_w if index not in of_x]

    def then(target: Any, *args: Any) -> Node:
        return call(gm, target, args, before=node, origin_from=node)

    rows = _ordered(then, x, of_x, kept + contracted)
    matrix = _weight(then, weight, of_w, new, contracted)
    if len(contracted) > 1:
        rows = then(aten.flatten.using_ints, rows, len(kept), -1)
        matrix = then(aten.flatten.using_ints, matrix, len(new), -1)
    sizes = [int(size) for size in matrix.meta["val"].shape[: len(new)]]
    if len(new) > 1:
        matrix = then(aten.flatten.using_ints, matrix, 0, len(new) - 1)
    product = then(aten.linear.default, rows, matrix)
    if len(new) > 1:
        product = then(aten.unflatten.int, product, -1, sizes)
    return _ordered(then, product, kept + new, list(out))


def tensordot_equation(left: int, right: int, left_dims: Sequence[int], right_dims: Sequence[int]) -> str:
    """The equation of a tensordot (or of inner, over the last dimensions) of tensors of these ranks.

    tensordot_equation(3, 2, [2], [0])  ->  "abc,cd->abd"
    """
    a = list(string.ascii_letters[:left])
    b = list(string.ascii_letters[left : left + right])
    for i, j in zip(left_dims, right_dims, strict=True):
        b[j] = a[i]
    out = [index for index in a if index not in b] + [index for index in b if index not in a]
    return f"{''.join(a)},{''.join(b)}->{''.join(out)}"


def _subscripts(equation: str, operands: list[Node]) -> list[str] | Miss:
    """The letters of each operand and of the result, with an ellipsis spelled out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    most = ""
    for index, operand in enumerate(operands):
        hidden = operand.meta["val"].dim() - len(terms[index].replace("...", ""))
        letters = "".join(free[:hidden][::-1]) if "..." in terms[index] else ""
        terms[index] = terms[index].replace("...", letters)
        most = letters if len(letters) > len(most) else most
    if not arrow:
        everything = "".join(terms)
        out = most + "".join(sorted(i for i in set(everything) if everything.count(i) == 1 and i not in most))
    return [*terms, out.replace("...", most)]


def _obstacle(equation: str, of_x: str, of_w: str, out: str) -> str:
    """Why this einsum is no linear layer; "" when it is one."""
    if any(len(set(term)) != len(term) for term in (of_x, of_w)):
        return f"the einsum '{equation}' takes a diagonal"
    shared = [index for index in of_x if index in of_w]
    if not shared:
        return f"the einsum '{equation}' contracts no index: it is an outer product"
    batch = [index for index in shared if index in out]
    if batch:
        return (
            f"the einsum '{equation}' has a batch of weights: '{batch[0]}' is in both operands and the result"
        )
    lost = [index for index in of_x + of_w if index not in out and index not in shared]
    if lost:
        return f"the einsum '{equation}' sums over '{lost[0]}', which only one operand has"
    if len(shared) == len(of_w):
        return f"the weight of the einsum '{equation}' adds no index to the result"
    return ""


def _ordered(then: Any, value: Node, have: Any, want: list[str]) -> Node:
    order = [list(have).index(index) for index in want]
    if order == list(range(len(order))):
        return value
    result: Node = then(aten.permute.default, value, order)
    return result


def _weight(then: Any, weight: Node, have: str, new: list[str], contracted: list[str]) -> Node:
    want = new + contracted
    if len(want) == 2 and list(have) == want[::-1]:
        result: Node = then(aten.t.default, weight)
        return result
    return _ordered(then, weight, have, want)
