"""Attention of a few queries over a cache of floats in main memory: a decoding step, without copies.

In: a graph. Out: the same, each `scaled_dot_product_attention` of up to `MOST_QUERIES` queries as
`bitfold.few_queries`, which reads the keys that heads share where they lie.

    %r = repeat_heads(%k); %s = repeat_heads(%v); %y = sdpa(%q, %r, %s, %mask, scale=0.125)
    ->  %y = few_queries(%q, %k, %v, %mask, 0.125)

torch's own attention takes one head of keys for each of queries, so that Inductor writes a cache three times
over (SmolLM2) before it is read, whether tokens are in it or not (`benchmarks/cpu_overhead.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...passes import Miss
from ...passes.edit import argument, call, replace
from .attention import MOST_QUERIES
from .sites import ATTENTION, unrepeated

FEW_QUERIES = torch.ops.bitfold.few_queries.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def few_queries(gm: GraphModule) -> int:
    """Rewrites the graph; returns how many attentions became the operator."""
    found = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=ATTENTION)):
        operands = _operands(node)
        if isinstance(operands, Miss):
            continue
        q, k, v = operands
        size: Any = q.meta["val"].shape
        scale = argument(node, "scale")
        scale = float(size[3]) ** -0.5 if scale is None else float(scale)
        mask = argument(node, "attn_mask")
        new = call(gm, FEW_QUERIES, (q, k, v, mask, scale), before=node, origin_from=node)
        replace(node, new)
        found += 1
    if found:
        gm.graph.eliminate_dead_code()
    return found


def _operands(node: Node) -> tuple[Node, Node, Node] | Miss:
    """q, k and v as the operator takes them."""
    q, (k, _), (v, _) = node.args[0], unrepeated(node.args[1]), unrepeated(node.args[2])
    values: list[Any] = [given.meta.get("val") if isinstance(given, Node) else None for given in (q, k, v)]
    if not all(_fits(value) for value in values):
        return Miss(
            "its operands are no tensors [B, H, T, D] of known sizes and one of the three float types"
        )
    (b, h, t, d), (kb, kh, _, kd) = values[0].shape, values[1].shape
    if values[1].shape != values[2].shape or (kb, kd) != (b, d) or h % kh:
        return Miss("its heads do not share keys and values evenly")
    if not 0 < t <= MOST_QUERIES or d % 16:
        return Miss("it has many queries, or heads of an odd size")
    if len({value.dtype for value in values}) > 1:
        return Miss("its operands are of several dtypes")
    if argument(node, "dropout_p", 0.0) or argument(node, "is_causal", False):
        return Miss("it drops some of its weights, or has a mask that only its sizes tell")
    if isinstance(argument(node, "scale"), Node):
        return Miss("its scale is computed")
    mask = argument(node, "attn_mask")
    if mask is not None and not _masks(mask.meta.get("val"), values[0], values[1]):
        return Miss("its mask has another shape or dtype")
    return q, k, v  # type: ignore[return-value]


def _fits(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == 4
        and value.dtype in DTYPES
        and value.device.type == "cpu"
        and not value.requires_grad
        and all(isinstance(size, int) and size > 0 for size in value.shape)
    )


def _masks(mask: object, q: Tensor, k: Tensor) -> bool:
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.dtype not in (torch.bool, q.dtype):
        return False
    wanted = (*q.shape[:3], k.shape[2])
    return mask.shape[3] == wanted[3] and all(a in (1, b) for a, b in zip(mask.shape, wanted, strict=True))


def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Shapes only."""
    from ...codegen.attention_operands import fresh

    return fresh(q)


def build_for_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The first call of a process: builds the operator in C++, which takes its own place."""
    from ...codegen.cpp.attention_build import attention_operator

    attention_operator()
    found: Tensor = torch.ops.bitfold.few_queries(q, k, v, mask, scale)
    return found


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What it computes, in torch; a query that sees nothing gets zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).float() for x in (k, v))
    scores = q.float() @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    return (weights @ v).to(q.dtype)
