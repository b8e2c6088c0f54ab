"""Biases and the epilogue on sums that the library made, for so many rows that its product is the faster one.

In: a spec and sums [M, n], one for each weight. Out: y [M, n], each number read once and written once.

    linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)
    ->  r0 = (y0 / (1.0 + tl.exp(-y0)));  r1 = (r0 * y1)

The text of the expression is the one that a kernel of its own has (`codegen/epilogue.py`). The sums come
rounded to x's dtype, which a kernel's own sums do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..spec import GemmSpec, Inputs, type_name
from .arguments import SUFFIXES, extra_names
from .build import module
from .lines import POINTERS, TL, Lines

# Numbers of a program: what four warps read in one go, eight to a thread.
SIZE = 1024


def arguments(spec: GemmSpec) -> dict[str, str]:
    """Name -> type, in the order of the signature; y may be the first of the sums."""
    suffixes = SUFFIXES[: spec.weights]
    found = {f"sum{suffix}": spec.x for suffix in suffixes}
    found |= {f"bias{suffix}": spec.x for suffix in suffixes if spec.bias}
    found |= dict.fromkeys(extra_names(spec).values(), spec.x)
    found["y"] = type_name(spec.out) or ""
    return {name: POINTERS[kind] for name, kind in found.items()} | {"m": "i32"}


def tile(n: int) -> tuple[int, int]:
    """(rows, columns) of a program."""
    columns = min(SIZE, 1 << (n - 1).bit_length())
    return SIZE // columns, columns


def finish_source(spec: GemmSpec) -> str:
    """The module's text."""
    rows, columns = tile(spec.n)
    out = Lines()
    out.add(f'"""finish {spec}"""', "import triton", "import triton.language as tl", "")
    out.add(*spec.epilogue.functions.splitlines(), "", "@triton.jit(do_not_specialize=['m'])")
    with out.indent(f"def kernel({', '.join(arguments(spec))}):"):
        out.add(
            f"rm = tl.program_id(0) * {rows} + tl.arange(0, {rows})",
            f"rn = tl.program_id(1) * {columns} + tl.arange(0, {columns})",
            f"inside = rn < {spec.n}",
            "kept = (rm < m)[:, None] & inside[None, :]",
            f"at = rm[:, None] * {spec.n} + rn[None, :]",
        )
        names = {}
        for i, suffix in enumerate(SUFFIXES[: spec.weights]):
            added = f" + {_column('bias' + suffix)}" if spec.bias else ""
            out.add(f"y{i} = {_matrix('sum' + suffix)}{added}")
            names[f"y{i}"] = f"y{i}"
        for leaf, argument in extra_names(spec).items():
            out.add(f"of_{argument} = {(_matrix if leaf[0] == 'e' else _column)(argument)}")
            names[leaf] = f"of_{argument}"
        lines, result = spec.epilogue.triton(names)
        out.add(*lines, f"tl.store(y + at, {result}.to({TL[str(type_name(spec.out))]}), mask=kept)")
    return "\n".join(out.text) + "\n"


def _matrix(name: str) -> str:
    return f"tl.load({name} + at, mask=kept, other=0.0).to(tl.float32)"


def _column(name: str) -> str:
    return f"tl.load({name} + rn, mask=inside, other=0.0).to(tl.float32)[None, :]"


@lru_cache(maxsize=1024)
def finish_kernel(spec: GemmSpec) -> Any:
    """The jitted function."""
    return module(finish_source(spec)).kernel


def finish(spec: GemmSpec, sums: Sequence[Tensor], given: Inputs) -> Tensor:
    """y [M, n] from contiguous sums [M, n] in x's dtype, the first of which it may be written over."""
    first = sums[0]
    y = first if spec.out == first.dtype else torch.empty_like(first, dtype=spec.out)
    m = first.shape[0]
    if m == 0:
        return y
    rows, columns = tile(spec.n)
    tensors = [*sums, *given.biases, *given.extras, y]
    named = dict(zip(arguments(spec), [*tensors, m], strict=True))
    finish_kernel(spec)[-(-m // rows), -(-spec.n // columns)](**named)
    return y
