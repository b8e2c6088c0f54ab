"""Our kernels on activations in codes: the product alone, and with the quantization of x before it.

In: a pair's name, n, k. Out: rows of the GEMM benchmark, two for each M.

    "int4 x fp8"                  the kernel on codes and scales of x that are there already
    "int4 x fp8, quantizing x"    x in bfloat16: what Inductor makes of quantizing it, then the kernel

The second is what a model pays. Its quantization is compiled once for all M (and once more for M = 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gemm_ours import Chooser
from gemm_rows import OURS, Row
from gpu_timing import microseconds
from torch import Tensor

from bitfold.codegen import GemmSpec, kernel_layout
from bitfold.codegen.compiling import Job
from bitfold.codegen.table import LIBRARY
from bitfold.codegen.trial import Trial, Weights
from bitfold.formats import format

# name -> (weight, activation, the type that its products are made in)
PAIRS = {
    "fp8 x fp8": ("float8_e4m3fn", "float8_e4m3fn", "fp8"),
    "fp8 x fp8 blocks": ("float8_e4m3fn[128x128]", "float8_e4m3fn[g128]", "fp8"),
    "int8 x int8": ("int8", "int8", "int8"),
    "int4 x fp8": ("int4[g128]", "float8_e4m3fn", "fp8"),
    "int4 x int8": ("int4[g128]", "int8", "int8"),
}
WITH_X = ", quantizing x"
LABELS = [name + end for name in PAIRS for end in ("", WITH_X)]


def spec_of(name: str, n: int, k: int) -> GemmSpec:
    weight, activation, _ = PAIRS[name]
    laid_out = kernel_layout(format(weight), k, format(activation))
    if laid_out is None:
        raise ValueError(f"no kernel multiplies {name} with rows of {k}; leave the shape out")
    return GemmSpec(laid_out, n, k, activation=format(activation))


def jobs(
    names: Sequence[str], shapes: Sequence[tuple[int, int]], ms: Sequence[int], pick: Chooser
) -> Iterator[Job]:
    """Every kernel that the rows need."""
    for n, k in shapes:
        for name in names:
            spec = spec_of(name, n, k)
            yield from ((str(spec), str(schedule)) for m in ms if (schedule := pick(spec, m)) is not None)


def row_of(name: str, spec: GemmSpec, m: int, weights: int, quantizing: bool, schedule: str) -> Row:
    """Without its time. Bytes: x comes as codes, or in bfloat16 of which codes are made."""
    return {
        "peer": OURS, "format": name + WITH_X * quantizing, "beside": [], "compute": PAIRS[name][2],
        "n": spec.n, "k": spec.k, "m": m, "us": None, "error": None,
        "bytes": weights + m * (spec.k * (2 if quantizing else 1) + 2 * spec.n), "schedule": schedule,
    }  # fmt: skip


def quantizing(spec: GemmSpec) -> Callable[..., Tensor]:
    """x in bfloat16 and a weight's parts to y, by Inductor and the kernel."""
    text, activation = str(spec), str(spec.activation)

    def run(x: Tensor, *parts: Tensor) -> Tensor:
        codes = torch.ops.bitfold.quantize(x, activation)
        y: Tensor = torch.ops.bitfold.fused([*codes, *parts], text)[0]
        return y

    return torch.compile(run, fullgraph=True)


def time_pair(name: str, given: argparse.Namespace, pick: Chooser, report: Callable[[Row], None]) -> None:
    """Rows of one pair, in this process."""
    for n, k in given.shapes:
        torch.cuda.empty_cache()
        spec = spec_of(name, n, k)
        weights, both = Weights.of(spec), quantizing(spec)
        for m in given.ms:
            chosen = pick(spec, m)
            schedule = LIBRARY if chosen is None else str(chosen)
            trial = Trial.of(weights, m)
            alone = row_of(name, spec, m, weights.nbytes, False, schedule)
            report(timed(alone, trial, partial(trial.calls, schedule), given.repeats))
            row = row_of(name, spec, m, weights.nbytes, True, schedule)
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            if m > 1:
                torch._dynamo.mark_dynamic(x, 0)
            report(timed(row, of_x(trial, x), partial(calls_of, both, x, weights), given.repeats))


def calls_of(run: Callable[..., Tensor], x: Tensor, weights: Weights) -> list[Callable[[], Tensor]]:
    return [partial(run, x, *copy) for copy in weights.copies]


def of_x(trial: Trial, x: Tensor) -> Trial:
    """The same with the result that this x must have, its codes as the format makes them."""
    activation = trial.weights.spec.activation
    assert activation is not None
    exact = activation.dequantize(activation.quantize(x.float())).float()
    return Trial(trial.weights, (), (), exact @ trial.weights.decoded[0].T)


def timed(row: Row, trial: Trial, calls: Callable[[], list[Callable[[], Any]]], repeats: int) -> Row:
    """The row with its error, and its time if the result is right."""
    try:
        made = calls()
        row["error"] = trial.error(made)
        row["failed"] = trial.problem(row["error"], made)
        if row["failed"] is None:
            row["us"] = microseconds(made, repeats)
    except Exception as refused:  # Triton's errors share no other base; the row says it
        row["failed"] = repr(refused)[:300]
    return row
