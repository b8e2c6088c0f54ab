"""Values of a GPU's kernels on a CPU: tiles, addresses, inline assembly, and what torch spells otherwise.

In: tensors; the text of a block of assembly that `lanes.py` printed. Out: tensors.

    assembly("lop3.b32 $0, $1, 0xF, 0, 0xC0;", [words], 1)   ->   [words & 0xF]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.codegen.lanes import Step, _evaluate


class Tile(torch.Tensor):
    """A tensor with the one conversion that torch spells differently."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Any:
        return self.view(dtype) if bitcast else torch.Tensor.to(self, dtype)


def tile(held: Tensor) -> Any:
    return held.as_subclass(Tile)


@dataclass
class Pointer:
    """An address: a place, or many, in a tensor seen as memory."""

    memory: Tensor
    at: Any = 0

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.memory, self.at + by)


def pointer(held: Tensor) -> Pointer:
    return Pointer(held.as_strided((held.untyped_storage().nbytes() // held.element_size(),), (1,), 0))


def _words(held: Tensor) -> np.ndarray:
    whole = torch.int16 if held.element_size() == 2 else torch.int8
    return np.ascontiguousarray(held.contiguous().view(whole).numpy()).view(np.uint32)


def assembly(text: str, inputs: Sequence[np.ndarray], results: int) -> list[np.ndarray]:
    """The registers $0 .. of a block that `lanes.py` printed, for input registers of one shape."""
    held: dict[str, Any] = {f"${results + i}": words for i, words in enumerate(inputs)}

    def value(name: str) -> Any:
        return held[name] if name in held else np.uint32(int(name, 0))

    for statement in re.sub(r"[{}\n]", " ", text).split(";"):
        op, _, rest = statement.strip().partition(" ")
        if not op or op.startswith(".reg"):
            continue
        out, *operands = (word.strip() for word in rest.split(","))
        kind, *more = op.split(".")
        if kind == "mov":
            held[out] = value(operands[0])
            continue
        detail: Any = more[-1].removesuffix("x2") if kind == "fma" else 0
        if kind in ("shl", "shr", "lop3"):
            detail = int(operands.pop(), 0)
        given = [value(name) for name in operands]
        held[out] = _evaluate(Step(kind, (), detail), given)
    return [held[f"${i}"] for i in range(results)]


def asm(text: str, constraint: str, args: Sequence[Any], *, dtype: Any, is_pure: bool, pack: int) -> Any:
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    shape = torch.broadcast_shapes(*(arg.shape for arg in args))
    registers = [_words(arg.as_subclass(torch.Tensor).expand(shape)) for arg in args]
    words = assembly(text, registers, len(dtypes))
    made = []
    for word, kind in zip(words, dtypes, strict=True):
        lanes = np.ascontiguousarray(word).view(np.int16 if pack == 2 else np.int8).reshape(shape)
        made.append(tile(torch.from_numpy(lanes.copy()).view(kind)))
    return made[0] if not isinstance(dtype, tuple) else tuple(made)


def pick(test: Any, a: Any, b: Any) -> Any:
    if not isinstance(test, Tensor):
        return a if test else b
    return torch.where(test, a, b)


def least(a: Any, b: Any) -> Any:
    return a.clamp(max=b) if isinstance(a, Tensor) else min(a, b)


def most(a: Any, b: Any) -> Any:
    return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)
