"""The operator that a fused region becomes on a GPU: its text regenerates the kernel anywhere.

In: `[x, *parts, bias?]` and the text of a `GemmSpec`. Out: `[y]`. Registered by `_operators.py`; packed
weights are inputs, never constants.

    bitfold.fused([x, codes, scales], "linear 4096x4096 bf16 int4[g128,halves256]")   ->   [y]

Which schedule runs is chosen at run time from the number of rows of x, so a graph with a varying one stays
one graph. Past `MOST_ROWS` the weight is decoded into memory for the length of one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..codegen import CodegenError, GemmSpec, choose
from ..formats import cache_tag


@lru_cache(maxsize=4096)
def parsed(text: str) -> GemmSpec:
    """The spec that a text says; CodegenError if it says none."""
    return GemmSpec.parse(text)


def split_inputs(spec: GemmSpec, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """(x, parts of the weight, bias or None)."""
    x, *rest = inputs
    wanted = len(spec.weight.parts) + int(spec.bias)
    if len(rest) != wanted:
        raise CodegenError(f"the kernel {spec} takes x and {wanted} tensors, not {len(rest)}")
    return x, rest[: len(spec.weight.parts)], rest[-1] if spec.bias else None


def weight_of(node: Node) -> tuple[list[object], str, int]:
    """(parts, format, K) of the weight that a call of the operator reads."""
    inputs, text = node.args
    assert isinstance(inputs, list | tuple) and isinstance(text, str)
    spec = parsed(text)
    return list(inputs[1 : 1 + len(spec.weight.parts)]), str(spec.weight), spec.k


def fused(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """What runs on a GPU."""
    # Triton is imported when the first kernel runs, not with bitfold.
    from ..codegen.triton.build import check, decode, launch

    spec = parsed(text)
    x, parts, bias = split_inputs(spec, inputs)
    rows = x.reshape(-1, spec.k).contiguous()
    check(spec, rows, parts, bias)
    schedule = choose(spec, rows.shape[0])
    if schedule is None:
        y = torch.nn.functional.linear(rows, decode(spec, parts, rows), bias)
    else:
        y = launch(spec, schedule, rows, parts, bias)
    return [y.reshape(*x.shape[:-1], spec.n)]


def fake(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """Shapes only."""
    spec = parsed(text)
    x = inputs[0]
    return [x.new_empty(*x.shape[:-1], spec.n)]


def not_in_main_memory(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """The same call on CPU tensors is an error: nothing falls back in silence."""
    raise CodegenError(
        "bitfold.fused is a CUDA kernel and was given tensors in main memory; lower the graph with target cpu"
    )


def keep(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
    """Saves the weight's parts for the backward."""
    tensors, text = inputs
    ctx.text, ctx.count = text, len(tensors)
    spec = parsed(text)
    ctx.save_for_backward(*tensors[1 : 1 + len(spec.weight.parts)])


def backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None], None]:
    """The gradient of x (and of the bias); codes are constants."""
    spec = parsed(ctx.text)
    (grad,) = grads
    weight = torch.ops.bitfold.dequantize(list(ctx.saved_tensors), str(spec.weight), spec.k, grad.dtype)
    found: list[Tensor | None] = [grad @ weight] + [None] * (ctx.count - 1)
    if spec.bias:
        found[-1] = grad.reshape(-1, spec.n).sum(0)
    return found, None


# Torch's compile caches know the operator by name only; what it computes is the text's and codegen's.
cache_tag.add("fused 1")
