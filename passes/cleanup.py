"""Cleaning passes: `fold_constants` computes what is known already, `eliminate_dead` drops what nobody uses.

Comes in: a graph at any stage. Goes out: the same function with fewer nodes, and fewer tensors held.

    fold_constants    mul(self.scale, 2.0)                 ->  self.mul_const
    eliminate_dead    unused = relu(x); self.unused_weight ->  (gone)

Neither alters the user's parameters: a folded constant is a new buffer of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..formats.errors import BitfoldError
from .constants import add_constant, constant_nodes, erase_dead_constants, is_parameter_expr, value_of
from .core import Pass
from .stages import Stage, operator_name


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate constant subgraphs whose result holds at most `limit` numbers.

    Views and casts of one parameter stay: they cost nothing, and tell where the weight comes from.
    """

    name: ClassVar[str] = "fold_constants"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = None
    produces: ClassVar[Stage | None] = None

    limit: int = 1 << 24

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise BitfoldError(f"fold_constants{{limit}} is {self.limit}; it counts numbers, 0 or more")

    def apply(self, gm: GraphModule) -> int:
        constants = _fixed(constant_nodes(gm))
        found = [node for node in gm.graph.nodes if self._worth_folding(gm, node, constants)]
        values: dict[Node, Any] = {}
        for node in found:
            tensor = value_of(gm, node, values)
            fresh = add_constant(gm, f"{node.name}_const", tensor, like=node)
            node.replace_all_uses_with(fresh)
        erase_dead_nodes(gm)
        erase_dead_constants(gm)
        return len(found)

    def _worth_folding(self, gm: GraphModule, node: Node, constants: set[Node]) -> bool:
        """A small enough constant that something not constant uses, and more than a view of a weight."""
        if (
            node.op != "call_function"
            or node not in constants
            or all(user in constants for user in node.users)
        ):
            return False
        # The reference form of a folded weight is a constant, too: computing it here would undo the folding.
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() > self.limit or _holds_codes(node):
            return False
        return not is_parameter_expr(gm, node)


def _fixed(constants: set[Node]) -> set[Node]:
    """The constants that no later call can find changed: those that no placeholder (a parameter of the
    user's, in the frame scope) goes into."""
    loose = {node for node in constants if node.op == "placeholder"}
    stack = list(loose)
    while stack:
        fresh = [user for user in stack.pop().users if user in constants and user not in loose]
        loose.update(fresh)
        stack.extend(fresh)
    return constants - loose


def _holds_codes(node: Node) -> bool:
    return any(operator_name(at.target).startswith("bitfold::") for at in _ancestors(node))


def _ancestors(node: Node) -> Iterable[Node]:
    seen = {node}
    stack = [node]
    while stack:
        at = stack.pop()
        yield at
        fresh = [source for source in at.all_input_nodes if source not in seen]
        seen.update(fresh)
        stack.extend(fresh)


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Drop nodes without users (what writes or asserts is kept), then the tensors that no node names."""

    name: ClassVar[str] = "eliminate_dead"
    requires: ClassVar[Stage | tuple[Stage, ...] | None] = None
    produces: ClassVar[Stage | None] = None

    def apply(self, gm: GraphModule) -> int:
        return erase_dead_nodes(gm) + erase_dead_constants(gm)


def erase_dead_nodes(gm: GraphModule) -> int:
    """Erase nodes that nobody uses, last first; return how many. Inputs stay, used or not."""
    erased = 0
    for node in reversed(gm.graph.nodes):
        if not node.users and not _has_effect(node):
            gm.graph.erase_node(node)
            erased += 1
    return erased


def _has_effect(node: Node) -> bool:
    # item() may be called for its failing on a value that is no number; here the number is not used at all.
    if node.target is torch.ops.aten.item.default:
        return False
    return node.is_impure()


__all__ = ["EliminateDead", "FoldConstants", "erase_dead_nodes"]
