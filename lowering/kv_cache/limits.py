"""How many tokens each query of an attention sees, taken from its mask: nodes that compute it on the device.

In: an attention and its mask. Out: a node, integers [B or 1, T or 1], and whether a mask is left to be read.

    mask = (arange(S) <= pos[:, None])[None, None]   ->   (pos + 1)[None], and no mask
    another mask of bools                            ->   the last token that it shows, + 1, and the mask
    no mask                                          ->   S;  causal without one: 1, 2, .. T
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...passes import Miss
from ...passes.edit import argument, call

aten = torch.ops.aten

# Comparison -> (which argument counts the tokens, whether the last token is itself seen).
COMPARED = {
    aten.le.Tensor: (0, True),
    aten.lt.Tensor: (0, False),
    aten.ge.Tensor: (1, True),
    aten.gt.Tensor: (1, False),
}


def mask_kind(node: Node, tokens: int) -> str | Miss:
    mask = argument(node, "attn_mask")
    if mask is None:
        return "none"
    shape = mask.meta["val"].shape
    if len(shape) < 2 or shape[-1] != tokens:
        return Miss(f"its mask is {list(shape)} and the cache has {tokens} tokens")
    if mask.meta["val"].dtype != torch.bool:
        return "float"
    return "none" if _prefix(mask) is not None else "bool"


def _prefix(mask: Node) -> tuple[Node, bool, list[int]] | None:
    """A mask that is `arange(S) <= last` with last [.., 1], through unsqueezes: (last, whether it is itself
    seen, the unsqueezes' dimensions); None for another mask."""
    dims: list[int] = []
    node: Any = mask
    while isinstance(node, Node) and node.target in (aten.unsqueeze.default, aten.expand.default):
        if node.target is aten.expand.default:  # limits of one entry or query serve all
            inner: Any = node.args[0]
            if inner.meta["val"].ndim != node.meta["val"].ndim:
                return None
            node = inner
            continue
        # Counted from the front, since the last dimension is another one here.
        dim = int(node.args[1])  # type: ignore[arg-type]
        dims.append(dim + node.meta["val"].ndim if dim < 0 else dim)
        node = node.args[0]
    if not isinstance(node, Node) or node.target not in COMPARED:
        return None
    index, itself = COMPARED[node.target]
    tokens, last = node.args[index], node.args[1 - index]
    if not isinstance(last, Node) or last.meta["val"].ndim < 2 or last.meta["val"].shape[-1] != 1:
        return None
    if last.meta["val"].ndim != node.meta["val"].ndim or not _counts(tokens, node.meta["val"].shape[-1]):
        return None
    if mask.meta["val"].ndim > 4 or any(dim >= node.meta["val"].ndim + len(dims) - 1 for dim in dims):
        return None
    shape = list(last.meta["val"].shape)
    for dim in reversed(dims):
        shape.insert(dim, 1)
    return (last, itself, dims[::-1]) if len(shape) < 4 or shape[1] == 1 else None


def _counts(node: Any, tokens: int) -> bool:
    """Whether a node is 0, 1, .. tokens - 1 along its last dimension."""
    while isinstance(node, Node) and node.target in (
        aten.unsqueeze.default,
        aten.view.default,
        aten.reshape.default,
    ):
        shape = node.meta["val"].shape
        if shape[-1] != tokens or node.meta["val"].numel() != tokens:
            return False
        node = node.args[0]
    while isinstance(node, Node) and node.target is aten.add.Tensor and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node):
        return False
    if node.target is aten.arange.default:
        return bool(node.args[0] == tokens)
    return node.target is aten.arange.start and tuple(node.args[:2]) == (0, tokens)


@dataclass
class Limits:
    """Makes limits in a graph, those of a mask once for all the layers that it masks."""

    gm: GraphModule
    made: dict[Any, Node] = field(default_factory=dict)

    def _new(self, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        return call(self.gm, target, args, kwargs, before=before, origin_from=before)

    def mask(self, node: Node) -> Node:
        """The mask with four dimensions."""
        mask = argument(node, "attn_mask")
        key = (mask, "four")
        if key not in self.made:
            wide = mask
            while wide.meta["val"].ndim < 4:
                wide = self._new(node, aten.unsqueeze.default, wide, 0)
            self.made[key] = wide
        return self.made[key]

    def of(self, node: Node, kind: str, tokens: int) -> Node:
        """Integers [B or 1, T or 1]: how many tokens each query sees."""
        mask, device = argument(node, "attn_mask"), node.meta["val"].device
        if mask is None:
            causal = bool(argument(node, "is_causal", False))
            queries = node.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
            key = (None, tokens, queries if causal else 0)
            if key not in self.made:
                ends = (1, queries + 1) if causal else (tokens, tokens + 1)
                at = self._new(node, aten.arange.start, *ends, device=device)
                self.made[key] = self._new(node, aten.unsqueeze.default, at, 0)
            return self.made[key]
        if mask not in self.made:
            prefix = _prefix(mask) if kind == "none" else None
            self.made[mask] = self._last_shown(node, tokens) if prefix is None else self._last(node, *prefix)
        return self.made[mask]

    def _last(self, node: Node, last: Node, itself: bool, dims: list[int]) -> Node:
        if itself:
            last = self._new(node, aten.add.Tensor, last, 1)
        for dim in dims:
            last = self._new(node, aten.unsqueeze.default, last, dim)
        while last.meta["val"].ndim < 4:
            last = self._new(node, aten.unsqueeze.default, last, 0)
        return self._new(node, aten.select.int, self._new(node, aten.select.int, last, 3, 0), 1, 0)

    def _last_shown(self, node: Node, tokens: int) -> Node:
        mask = self.mask(node)
        if mask.meta["val"].dtype != torch.bool:
            mask = self._new(node, aten.gt.Scalar, mask, float("-inf"))
        count = self._new(node, aten.arange.start, 1, tokens + 1, device=node.meta["val"].device)
        return self._new(node, aten.amax.default, self._new(node, aten.mul.Tensor, mask, count), [1, 3])
