"""Large tensors a few rows at a time, so that the intermediate results stay in the processor's cache.

In: a function of rows and their parameters. Out: the same result, several times sooner.

    by_rows(f, x [49152, 576], [scales [49152, 9]])  ->  f on 911 rows at a time, written into one result

Each intermediate of a hundred megabytes is otherwise fresh memory whose page faults cost more than the
arithmetic. Only real tensors on a CPU are cut: what is traced, faked, compiled or differentiated goes whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Numbers in a piece: 2 MiB as float32, about a second-level cache.
PIECE = 1 << 19

Rowwise = Callable[[Tensor, list[Tensor]], Tensor]


def by_rows(function: Rowwise, x: Tensor, params: Sequence[Tensor], rows: int | None) -> Tensor:
    """function(x, params), where result and params go row by row with x.

    `rows` of x share one row of params (1 for rows and groups, a for blocks of a rows); a parameter of one
    element serves all of them, and so does every one if `rows` is None.
    """
    if not _worthwhile(x, params):
        return function(x, list(params))
    flat = x.reshape(-1, x.shape[-1])
    each = [p.reshape(-1, p.shape[-1]) for p in params]
    share = rows or 1
    step = max(PIECE // (x.shape[-1] * share), 1) * share
    out: Tensor | None = None
    for start in range(0, flat.shape[0], step):
        stop = min(start + step, flat.shape[0])
        some = [p if p.shape[0] == 1 else p[start // share : -(-stop // share)] for p in each]
        piece = function(flat[start:stop], some)
        if out is None:
            out = piece.new_empty((flat.shape[0], piece.shape[-1]))
        out[start:stop] = piece
    assert out is not None
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _worthwhile(x: Tensor, params: Sequence[Tensor]) -> bool:
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in (x, *params)):
        return False
    if torch.compiler.is_compiling() or x.numel() < 2 * PIECE or x.ndim < 2:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params)))
