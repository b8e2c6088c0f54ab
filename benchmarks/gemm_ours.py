"""Our generated kernels as the GEMM benchmark calls them, compiled beforehand in parallel.

In: a format's text, n, k, and a way to choose a schedule for m rows. Out: `Ours`, ready to check and to time.

    ours = Ours.of("int4[g128]", 4096, 4096, chooser(None))
    ours.checked(16)                  ->   y, x as float32, and the error against float32
    compile_all(jobs, workers=14, seconds=200)   ->   {job: why it failed}; the rest is in Triton's cache

Where no schedule is chosen the weight is decoded into memory and the library multiplies: what is timed then
is both, every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gpu_timing import copies_past_cache
from torch import Tensor

from bitfold.codegen import GemmSpec, Schedule, choose, kernel_layout
from bitfold.codegen.compiling import Job
from bitfold.codegen.compiling import compile_all as compile_all
from bitfold.codegen.compiling import shaped_parts as shaped_parts
from bitfold.codegen.pipelined import Pipelined, parsed
from bitfold.codegen.trial import BOUND
from bitfold.codegen.triton.build import decode
from bitfold.codegen.triton.run import run
from bitfold.formats import Quantized, format

FORMATS = [
    "int4[g128]", "int8", "float8_e4m3fn", "float6_e3m2[g32,e8m0]", "mxfp4", "nvfp4", "nf4[g64]",
    "int3[g128]", "int2[g128]",
]  # fmt: skip
Chooser = Callable[[GemmSpec, int], Schedule | Pipelined | None]


def chooser(text: str | None) -> Chooser:
    """One schedule for all, or what bitfold itself chooses."""
    if text is None:
        return choose
    schedule = parsed(text)
    return lambda spec, m: schedule


def spec_of(text: str, n: int, k: int) -> GemmSpec:
    laid_out = kernel_layout(format(text), k)
    if laid_out is None:
        raise ValueError(f"no kernel walks over {text} with rows of {k}; leave it out of --formats")
    return GemmSpec(laid_out, n, k)


def jobs_of(
    texts: Sequence[str], shapes: Sequence[tuple[int, int]], ms: Sequence[int], pick: Chooser
) -> list[Job]:
    """Every kernel that the rows need, once."""
    found: dict[Job, None] = {}
    for n, k in shapes:
        for text in texts:
            spec = spec_of(text, n, k)
            for schedule in (pick(spec, m) for m in ms):
                if schedule is not None:
                    found[str(spec), str(schedule)] = None
    return list(found)


@dataclass(frozen=True)
class Ours:
    """copies: of the parts of one quantized weight; weight: the same decoded by the reference, in float32."""

    spec: GemmSpec
    pick: Chooser
    copies: list[list[Tensor]]
    weight: Tensor

    @classmethod
    def of(cls, text: str, n: int, k: int, pick: Chooser) -> Ours:
        spec = spec_of(text, n, k)
        fmt = spec.weight
        q = fmt.quantize(torch.randn(n, k, device="cuda") * 0.05)
        one = q.parts
        weight = fmt.dequantize(Quantized.from_parts(fmt, q.parts, k)).float()
        copies = copies_past_cache(sum(part.nbytes for part in one))
        others = [[part.clone() for part in one] for _ in range(copies - 1)]
        return cls(spec, pick, [one, *others], weight)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.copies[0])

    def schedule(self, m: int) -> str:
        chosen = self.pick(self.spec, m)
        return "decode, then the library" if chosen is None else str(chosen)

    def calls(self, x: Tensor) -> list[Callable[[], Tensor]]:
        """One for each copy; the outputs are one and the same memory, NaN before."""
        spec, m = self.spec, x.shape[0]
        schedule = self.pick(spec, m)
        if schedule is None:
            return [lambda p=p: torch.nn.functional.linear(x, decode(spec, p, x)) for p in self.copies]
        y = torch.full((m, spec.n), float("nan"), device="cuda", dtype=x.dtype)
        return [lambda p=p: run(spec, schedule, [x, *p], out=y) for p in self.copies]

    def problem(self, x: Tensor, error: float, calls: Sequence[Callable[[], Tensor]]) -> str | None:
        """Why a time of these calls would be worth nothing: a wrong result, or another one each run."""
        if not error <= BOUND:
            return f"error {error:.2g} is over {BOUND:.2g}"
        first = calls[0]().clone()
        return None if torch.equal(first, calls[0]()) else "two runs differ"
