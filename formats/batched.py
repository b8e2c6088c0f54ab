"""What `torch.vmap` does with an operator of ours: calls it for each member of the batch.

In: an operator that writes to nothing. Out: its rule, for `torch.library.register_vmap`.

    vmap(quantize)(x [B, M, K])   ->   quantize(x[0]), quantize(x[1]), ..;   each part stacked

Whatever the operator means by its inputs, a scale for a whole tensor or other weights for each member, this
is the function mapped. Where a batch may be more rows there is a rule of its own (`lowering/fused.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import FormatError


def one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of `op`, whose result is a tensor or a list of them: stacked along a new first dimension. What
    it returns raises FormatError if the batch is empty."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise FormatError(f"torch.vmap maps {op} over a batch of none; give at least one")
        made = [op(*_member(list(args), list(in_dims), i)) for i in range(info.batch_size)]
        if isinstance(made[0], Tensor):
            return torch.stack(made), 0
        stacked = [torch.stack(parts) for parts in zip(*made, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


def _member(given: Any, dims: Any, i: int) -> Any:
    """Member i of what is batched along `dims`; what is in no batch as it is."""
    if isinstance(given, list | tuple):
        inner = dims if isinstance(dims, list | tuple) else [dims] * len(given)
        return [_member(one, dim, i) for one, dim in zip(given, inner, strict=True)]
    return given if dims is None or not isinstance(given, Tensor) else given.select(dims, i)
