"""Checks of the graph: what stands beside a kernel that could be in it, and products in float32 where the
model computes in less.

In: an `Inspection`. Out: findings.

    relu(y0) behind a generated kernel, in a kernel of its own
    ->  "relu stands behind its kernel, on its own: ..."
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...passes.anchors import TARGETS
from ...passes.fuse import ANCHORS, EPILOGUE
from ...passes.provenance import origin
from ..inspection import Inspection
from .finding import Finding

aten = torch.ops.aten
DEQUANTIZE = torch.ops.bitfold.dequantize.default
_KERNELS = (torch.ops.bitfold.fused.default, torch.ops.bitfold.conv.default)


def not_fused(found: Inspection) -> Iterator[Finding]:
    """What runs beside a kernel: a weight decoded into memory in each call; an operation behind a result."""
    total = sum(done.seconds or 0.0 for done in found.work.values())
    lowered = any(step.name == "lower" for step in found.trace.steps)

    def points(node: Node) -> float:
        done = found.work.get(node.name)
        return 100.0 * (done.seconds or 0.0) / total if done is not None and total else 0.0

    for node in found.final.graph.nodes:
        if node.target is DEQUANTIZE and node.all_input_nodes and _of_weight(node):
            why = (
                "a reference operator in front of the product"
                if lowered
                else "no target was asked to lower it"
            )
            remedy = "give the pipeline fuse and lower{target=...}; on a GPU kernels want bfloat16 or float16"
            what = f"its weight is decoded into memory in each call, {why}"
            yield Finding(25.0 + points(node), "decoded", _place(node), what, remedy, node.name)
        behind = _behind(node)
        if behind is None or not _is_pointwise(node):
            continue
        name = str(node.target).split(".")[1]
        readers = len(behind.users)
        if readers > 1:
            continue  # the result is read elsewhere too, so it is written in any case
        why = (
            "kernels do it, and here something is in the way (another shape, or a write in between)"
            if node.target in EPILOGUE
            else "it is none of the operations that a kernel's epilogue has"
        )
        what = f"{name} stands behind its kernel in an operation of its own: {why}"
        names = ", ".join(
            sorted(str(t).split(".")[1] for t in EPILOGUE if isinstance(t, torch._ops.OpOverload))
        )
        remedy = (
            f"one of {names} in its place" if node.target not in EPILOGUE else "the operation right behind"
        )
        yield Finding(30.0 + points(node), "not fused", _place(behind), what, remedy, node.name)


def _of_weight(node: Node) -> bool:
    return all(part.op in ("get_attr", "placeholder") for part in node.all_input_nodes)


def _behind(node: Node) -> Node | None:
    """The kernel's result that an operation reads first, if it does."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    for source in node.all_input_nodes:
        taken = source.args[0] if source.target is operator.getitem else None
        if isinstance(taken, Node) and taken.target in _KERNELS:
            return source
    return None


def _is_pointwise(node: Node) -> bool:
    """Torch's own word for it, and a result in the shape of what is read."""
    tags = getattr(node.target, "tags", ())
    value, first = node.meta.get("val"), node.all_input_nodes[0].meta.get("val")
    same = isinstance(value, Tensor) and isinstance(first, Tensor) and value.shape == first.shape
    return same and (torch.Tag.pointwise in tags or node.target in EPILOGUE)


def wide_products(found: Inspection) -> Iterator[Finding]:
    """Products with a weight that compute in float32 though most weights of the model are narrower."""
    held = Counter[torch.dtype]()
    for parameter in found.reference.parameters():
        if parameter.is_floating_point():
            held[parameter.dtype] += parameter.numel()
    usual = held.most_common(1)[0][0] if held else torch.float32
    if usual not in (torch.bfloat16, torch.float16):
        return
    for node in found.reference.graph.nodes:
        if node.target not in TARGETS or node.target not in ANCHORS:
            continue
        value = node.meta.get("val")
        cast = _cast_up(node.args[TARGETS[node.target][1]])
        if isinstance(value, Tensor) and value.dtype == torch.float32 and cast is not None:
            at = origin(node)
            what = (
                f"its input is cast to float32 ({at.where}: `{at.text}`), and so the product is one of "
                f"float32 in a model of {str(usual).removeprefix('torch.')}: twice the bytes, and no fused "
                "kernel on a GPU"
            )
            remedy = "leave the cast out, or put it behind the product"
            yield Finding(70.0, "cast", at.module_path, what, remedy, node.name)


def _cast_up(node: Any) -> Node | None:
    """The cast to float32 that the value comes from, through views."""
    seen = 0
    while isinstance(node, Node) and seen < 8:
        value = node.meta.get("val")
        first = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
        if isinstance(value, Tensor) and isinstance(first, Tensor):
            if first.dtype != value.dtype and first.is_floating_point() and value.dtype == torch.float32:
                return node
            if first.dtype != value.dtype:
                return None
        if not node.all_input_nodes:
            return None
        node, seen = node.all_input_nodes[0], seen + 1
    return None


def _place(node: Node) -> str:
    return origin(node).module_path or node.name
