"""A product of x with a quantized weight, whichever operator makes it: what a kernel would read, told apart.

In: a node of a region. Out: its `Product`; a `Miss` if it is one that no kernel makes; None if it is none.

    linear(%x, %w, %b)                                   ->   Product(x=%x, weight=%w, bias=%b)
    _grouped_mm(%x, transpose(%w, -2, -1), %ends)        ->   Product(x=%x, weight=%w, ends=%ends)

%w is the weight's `dequantize`: [N, K], or [E, N, K] for experts, of whose tokens, sorted by expert, `ends`
says where each one's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..passes import Miss
from .inductor import dequantized

aten = torch.ops.aten

_SAME = (aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)


@dataclass(frozen=True)
class Product:
    """node: the operator; weight: the `dequantize` of its weight."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None = None
    ends: Node | None = None

    @property
    def experts(self) -> int:
        """0 where x has one weight."""
        return int(self.weight.meta["val"].shape[0]) if self.ends is not None else 0

    @property
    def n(self) -> int:
        """Columns of the result."""
        return int(self.weight.meta["val"].shape[-2])


def product(node: Node) -> Product | Miss | None:
    """What `node` multiplies, if it multiplies by a quantized weight."""
    if node.target is aten.linear.default:
        x, weight, *bias = node.args
        found = dequantized(weight)
        if found is None or not isinstance(x, Node):
            return None
        return Product(node, x, found, bias[0] if bias and isinstance(bias[0], Node) else None)
    if node.target is aten._grouped_mm.default:
        return _grouped(node)
    return None


def products(weight: Node) -> Iterator[Product]:
    """The products that read a `dequantize`, through views of it or not."""
    for user in weight.users:
        if user.target in _SAME or _swaps(user):
            yield from products(user)
        elif isinstance(found := product(user), Product):
            yield found


def _grouped(node: Node) -> Product | Miss | None:
    x, weight, ends, bias, out = [*node.args, None, None, None][:5]
    ends, bias, out = (node.kwargs.get(k, v) for k, v in (("offs", ends), ("bias", bias), ("out_dtype", out)))
    found = _transposed(weight)
    if found is None or not isinstance(x, Node):
        return None
    if not isinstance(ends, Node) or x.meta["val"].ndim != 2 or found.meta["val"].ndim != 3:
        return Miss("kernels of experts take rows of x [M, K], sorted by expert, and the last row of each")
    if bias is not None or out not in (None, x.meta["val"].dtype):
        return Miss("kernels of experts add no bias and write the dtype of x")
    return Product(node, x, found, ends=ends)


def _transposed(weight: object) -> Node | None:
    """The `dequantize` of which `weight` is the transpose, its last two dimensions swapped."""
    swaps = 0
    while isinstance(weight, Node) and (weight.target in _SAME or _swaps(weight)):
        swaps += weight.target not in _SAME
        weight = weight.args[0]
    return dequantized(weight) if swaps % 2 else None


def _swaps(node: Node) -> bool:
    """Whether the node swaps the last two dimensions of three."""
    if node.target is aten.mT.default:
        return True
    if node.target is aten.transpose.int and node.meta["val"].ndim == 3:
        return sorted(int(dim) % 3 for dim in node.args[1:3]) == [1, 2]  # type: ignore[arg-type]
    return False
