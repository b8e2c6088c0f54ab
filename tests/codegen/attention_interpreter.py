"""A process in which Triton interprets the attention kernels: jobs come in as arguments of `attend`, `write`.

Like `interpreter.py`, whose way of sending tensors it uses.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import torch
from interpreter import GUARD, receive, send


def attend(runs: list[dict[str, Any]], q: torch.Tensor, **given: Any) -> dict[str, Any]:
    """y of each run into poisoned memory, and whether the memory around it is as it was."""
    from bitfold.codegen.triton.attention_build import attend as launch

    batch, heads, queries, dim = q.shape
    size = batch * heads * queries * dim
    found, guarded = [], True
    for i, run in enumerate(runs):
        memory = torch.full((size + 2 * GUARD,), -77.0, dtype=q.dtype)
        out = memory[GUARD : GUARD + size].view(batch, queries, heads, dim).transpose(1, 2)
        out.fill_((float("nan"), 3e4)[i % 2])
        launch(q=q, out=out, plain=True, **given, **run)
        guarded &= bool((memory[:GUARD] == -77).all() and (memory[GUARD + size :] == -77).all())
        found.append(out.clone())
    return {"y": found, "guarded": guarded}


def write(cache: list[torch.Tensor], **given: Any) -> dict[str, Any]:
    """The cache after a write."""
    from bitfold.codegen.triton.attention_build import cache_write

    cache_write(cache=cache, **given)
    return {"cache": cache}


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            job = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            told: Any = {"attend": attend, "write": write}[job.pop("what")](**job)
        except Exception:
            told = traceback.format_exc()
        send(told, answers)


if __name__ == "__main__":
    main()
