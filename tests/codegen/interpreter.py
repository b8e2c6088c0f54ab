"""A process in which Triton interprets kernels: it reads jobs from its input and answers on its output.

In: dicts of the arguments of `answer`, or of `finish`. Out: for each a dict, or a str, the traceback.

Whether Triton interprets is settled when it is imported, and the tests around need the compiler, so this is a
process of its own (`conftest.py` starts one a session).
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import traceback
from typing import Any, BinaryIO

import torch

GUARD = 64


def send(what: Any, to: BinaryIO) -> None:
    """Bare pickles cannot hold tensors of 8-bit floats, so they go the way that files go."""
    held = io.BytesIO()
    torch.save(what, held)
    pickle.dump(held.getvalue(), to)
    to.flush()


def receive(of: BinaryIO) -> Any:
    return torch.load(io.BytesIO(pickle.load(of)), weights_only=False)


def product(spec: Any, schedule: Any, inputs: list[torch.Tensor]) -> dict[str, Any]:
    """y [M, N] of two runs (without a split, of one) with poisoned outputs and workspaces, the locks after
    them, and whether the memory around y is as it was."""
    from bitfold.codegen.triton.arguments import sums_are_integers
    from bitfold.codegen.triton.build import grid, launch, workspace_size

    m, n = inputs[0].shape[0], spec.n
    programs = grid(spec, schedule, m)
    locks = torch.zeros(max(programs[0] * programs[2], 1), dtype=torch.int32)
    runs = []
    # The order of programs is not the question without a split, nor a second run then.
    for poison in (float("nan"), 3e4)[: 1 if schedule.split == 1 else 2]:
        memory = torch.full((m * n + 2 * GUARD,), -77.0, dtype=spec.out)
        out = memory[GUARD : GUARD + m * n].view(m, n)
        out.fill_(poison)
        partial = torch.full((workspace_size(spec, schedule, m) + GUARD,), poison)
        if sums_are_integers(spec, schedule):
            partial = torch.full_like(partial, 77777, dtype=torch.int32)
        y = launch(spec, schedule, inputs, out=out, workspace=(partial, locks), plain=True)
        assert y.data_ptr() == out.data_ptr()
        guarded = (memory[:GUARD] == -77).all() and (memory[GUARD + m * n :] == -77).all()
        runs.append((out.clone(), bool(guarded)))
    return {
        "y": runs[0][0],
        "again": runs[-1][0],
        "guarded": all(guarded for _, guarded in runs),
        "locks": locks,
    }


def finish(spec: Any, inputs: list[torch.Tensor], sums: list[torch.Tensor]) -> dict[str, Any]:
    """y [M, N] from sums, with poison behind them."""
    from bitfold.codegen.triton.finish import finish

    memory = torch.full((sums[0].numel() + GUARD,), float("nan"), dtype=sums[0].dtype)
    first = memory[: sums[0].numel()].view_as(sums[0]).copy_(sums[0])
    y = finish(spec, [first, *sums[1:]], spec.inputs(inputs))
    return {"y": y.clone(), "guarded": bool(memory[sums[0].numel() :].isnan().all())}


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


def rounding(
    spec: Any, x: Any, scales: list[torch.Tensor], gradient: Any = None, added: Any = None
) -> dict[str, Any]:
    """What a kernel of training gives. added: an estimator that it is of, if it is a user's."""
    from bitfold.formats import estimators

    if added is not None and added.name not in estimators.known():
        estimators.register(added)
    from bitfold.codegen.triton.rounding_build import gradients, rounded

    if gradient is None:
        return {"made": (rounded(spec, x, scales, plain=True),)}
    return {"made": gradients(spec, x, scales, gradient, plain=True)}


JOBS = {"product": product, "finish": finish, "attend": attend, "write": write, "rounding": rounding}


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not come between the answers
    while True:
        try:
            job = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            told: Any = JOBS[job.pop("what", "product")](**job)
        except Exception:
            told = traceback.format_exc()
        send(told, answers)


if __name__ == "__main__":
    main()
