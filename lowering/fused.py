"""The operator that a fused region becomes on a GPU or a CPU: its text regenerates the kernel anywhere.

In: a kernel's inputs and the text of its `GemmSpec` (see `codegen/spec.py`). Out: `[y]`. Registered by
`_operators.py`; packed weights are inputs, never constants.

    bitfold.fused([x, codes, scales], "linear 4096x4096 bf16 int4[g128,halves256]")   ->   [y]

Which schedule runs is chosen at run time from the number of rows of x, so a graph with a varying one stays
one graph. Past `MOST_ROWS` the weight is decoded into memory for the length of one product of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from ..codegen import CodegenError, GemmSpec, Inputs, choose, library
from ..codegen.choose import alone
from ..formats import FormatError, cache_tag
from ..formats.batched import one_by_one
from ..formats.ops import no_gradient_text


@lru_cache(maxsize=4096)
def parsed(text: str) -> GemmSpec:
    """The spec that a text says; CodegenError if it says none."""
    return GemmSpec.parse(text)


def weights_of(node: Node) -> list[tuple[list[object], str, int]]:
    """(parts, format, K) of each weight that a call of the operator reads."""
    inputs, text = node.args
    assert isinstance(inputs, list | tuple) and isinstance(text, str)
    spec = parsed(text)
    first, count = 1 + (spec.activation is not None) + bool(spec.experts), len(spec.weight.parts)
    starts = range(first, first + spec.weights * count, count)
    return [(list(inputs[at : at + count]), str(spec.weight), spec.k) for at in starts]


def fused(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """What runs on a GPU."""
    # Triton is imported when the first kernel runs, not with bitfold.
    from ..codegen.triton.build import check
    from ..codegen.triton.run import run

    spec = parsed(text)
    x = inputs[0]
    rows = _as_rows(spec, inputs)
    given = check(spec, rows)
    # Triton launches on the current device, whatever the tensors are on.
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        schedule = choose(spec, given.x.shape[0])
        y = run(spec, schedule, rows) if schedule is not None else by_library(spec, given)
    return [y.reshape(*x.shape[:-1], spec.n)]


def _as_rows(spec: GemmSpec, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs as the kernel takes them: x [M, k], the epilogue's matrices [M, n]; a weight's parts as they
    are, the rest contiguous."""
    found = list(inputs)
    found[0] = inputs[0].reshape(-1, spec.k).contiguous()
    if spec.activation is not None:
        found[1] = inputs[1].contiguous()
    if spec.experts:
        ends = 1 + (spec.activation is not None)
        found[ends] = inputs[ends].contiguous()
    extras = spec.arity - spec.epilogue.count("e") - spec.epilogue.count("v")
    for i in range(extras - spec.weights * spec.bias, spec.arity):
        matrix = extras <= i < extras + spec.epilogue.count("e")
        found[i] = (inputs[i].reshape(-1, spec.n) if matrix else inputs[i]).contiguous()
    return found


def by_library(spec: GemmSpec, given: Inputs) -> Tensor:
    """The same with products first, where that is faster: the library's (`codegen/library.py`), or pipelined
    ones, and what stands behind them in a kernel of its own."""
    from ..codegen.triton.run import run

    def by_torch(of: GemmSpec, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        return library.product(of, given.x, given.x_scales, parts, bias)

    if spec.epilogue.plain:
        return by_torch(spec, given.parts[0], given.biases[0] if spec.bias else None)
    from ..codegen.triton.finish import finish as finish_at_once

    product = alone(spec)
    schedule = choose(product, given.x.shape[0])
    if schedule is None:
        return finish_at_once(spec, [by_torch(product, parts) for parts in given.parts], given)
    first = [given.x] if given.x_scales is None else [given.x, given.x_scales]
    return finish_at_once(spec, [run(product, schedule, [*first, *parts]) for parts in given.parts], given)


def finish(spec: GemmSpec, sums: Sequence[Tensor], given: Inputs) -> Tensor:
    """Biases and the epilogue on sums [M, n], in float32, rounded once: the reference, with gradients."""
    named = {f"y{i}": y.float() + given.biases[i] if spec.bias else y for i, y in enumerate(sums)}
    matrices = spec.epilogue.count("e")
    named |= {f"e{i}": extra for i, extra in enumerate(given.extras[:matrices])}
    named |= {f"v{i}": extra for i, extra in enumerate(given.extras[matrices:])}
    return spec.epilogue.run(named).to(spec.out)


def fake(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """Shapes only. Sets the memory aside that kernels count in, before a CUDA graph is captured."""
    spec = parsed(text)
    x = inputs[0]
    if x.device.type == "cuda" and torch.cuda.is_available():
        from ..codegen.triton.locks import reserve

        with unset_fake_temporarily():
            reserve(x.device)
    return [x.new_empty(*x.shape[:-1], spec.n, dtype=spec.out)]


def mapped(info: Any, in_dims: tuple[Any, Any], inputs: list[Tensor], text: str) -> tuple[Any, Any]:
    """What `torch.vmap` does: members of a batch are more rows of x; of other weights, or of a scale of x for
    all of a member, each is a call. A batch of none is none of y."""
    spec, dims = parsed(text), list(in_dims[0])
    vectors = spec.epilogue.count("v")
    matrices = range(spec.arity - vectors - spec.epilogue.count("e"), spec.arity - vectors)
    rows = {0, *matrices} | ({1} if _scaled_by_row(spec) else set())
    if info.batch_size == 0:
        sizes = [size for at, size in enumerate(inputs[0].shape) if at != dims[0]]
        return [inputs[0].new_empty(0, *sizes[:-1], spec.n, dtype=spec.out)], [0]
    if spec.experts or any(dim is not None for i, dim in enumerate(dims) if i not in rows):
        found: tuple[Any, Any] = one_by_one(torch.ops.bitfold.fused)(info, in_dims, inputs, text)
        return found
    given = list(inputs)
    for i in rows:
        one, dim = inputs[i], dims[i]
        given[i] = one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0)
    return torch.ops.bitfold.fused(given, text), [0]


def _scaled_by_row(spec: GemmSpec) -> bool:
    """Whether codes of x come with a scale a row, and not with one for all of them."""
    scale = None if spec.activation is None else spec.activation.scale
    return scale is not None and scale.granularity.rows is not None


def build_for_cpu(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    """The first call on CPU tensors of a process: builds the operator in C++, which takes its own place."""
    spec = parsed(text)
    device = inputs[0].device.type if inputs else "no device"
    if device != "cpu":
        raise CodegenError(f"bitfold.fused runs on CUDA devices and CPUs, not on {device}")
    if any(tensor.layout is not torch.strided for tensor in inputs):
        raise CodegenError("bitfold.fused takes tensors whose numbers all lie in memory; call .to_dense()")
    from ..codegen.cpp.build import know

    know([spec])
    found: list[Tensor] = torch.ops.bitfold.fused(list(inputs), text)
    return found


def keep(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
    """Saves the inputs for the backward."""
    tensors, ctx.text = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor | None], None]:
    """The gradients of x, of biases and of what the epilogue reads; codes are constants."""
    spec, tensors, (grad,) = parsed(ctx.text), list(ctx.saved_tensors), grads
    if spec.activation is not None or spec.experts:
        raise FormatError(no_gradient_text(str(spec.activation or spec)))
    given = spec.inputs(tensors)
    floats = {
        i
        for i, tensor in enumerate(tensors)
        if any(tensor is t for t in (given.x, *given.biases, *given.extras))
    }
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(i in floats) for i, t in enumerate(tensors)]
        again = spec.inputs(leaves)
        weights = [
            torch.ops.bitfold.dequantize(list(parts), str(spec.weight), spec.k, grad.dtype)
            for parts in again.parts
        ]
        y = finish(spec, [again.x @ weight.mT for weight in weights], again)
    wanted = sorted(floats)
    found = torch.autograd.grad(y, [leaves[i] for i in wanted], grad)
    by_place = dict(zip(wanted, found, strict=True))
    return [by_place.get(i) for i in range(len(tensors))], None


# Torch's compile caches know the operator by name only; what it computes is the text's and codegen's.
cache_tag.add("fused 2")
