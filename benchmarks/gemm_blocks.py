"""More than one product: the MLP of a Llama block, and the experts of a mixture.

In: a name. Out: rows of the GEMM benchmark, ours and what it is compared with.

    mlp       x + down(silu(gate(x)) * up(x)), 14336 x 4096: two kernels, against the same three unfused and
              against bf16, all compiled by Inductor
    experts   8 of 14336 x 4096, tokens evenly among them: one kernel, against one of ours for each expert,
              for whom the host knows where its tokens end, and against torch's grouped product in bf16

Each is checked against float32 before it is timed. N x K counts all weights: 43008 x 4096, 114688 x 4096.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from gemm_ours import Chooser
from gemm_rows import OURS, Row
from gpu_timing import copies_past_cache, microseconds
from torch import Tensor
from torch.nn.functional import linear, silu

from bitfold.codegen import GemmSpec, choose, kernel_layout
from bitfold.codegen.compiling import Job
from bitfold.codegen.epilogue import Epilogue
from bitfold.codegen.trial import BOUND, Trial, Weights
from bitfold.formats import format

WIDTH, HIDDEN, EXPERTS = 4096, 14336, 8
MLP, GROUPED = "mlp", "experts"
BLOCKS = (MLP, GROUPED)
WEIGHT = "int4[g128]"
Fused = Callable[[list[Tensor], str], list[Tensor]]
Parts = tuple[list[Tensor], list[Tensor], list[Tensor]]


def laid_out(text: str, n: int, k: int) -> GemmSpec:
    found = kernel_layout(format(text), k)
    assert found is not None
    return GemmSpec(found, n, k)


@dataclass(frozen=True)
class Mlp:
    """weights: parts of gate, up and down; wide, down: their products, each by itself; texts: of the two
    fused kernels, and of these, made beforehand since no compiler traces how a text is put together."""

    wide: GemmSpec
    down: GemmSpec
    weights: Parts
    texts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(map(str, (*self.specs, self.wide, self.down))))

    @classmethod
    def of(cls, text: str, width: int, hidden: int, device: str) -> Mlp:
        wide, down = laid_out(text, hidden, width), laid_out(text, width, hidden)
        specs = (wide, wide, down)
        made = [s.weight.quantize(torch.randn(s.n, s.k, device=device) * 0.02).parts for s in specs]
        return cls(wide, down, (made[0], made[1], made[2]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.weights for part in parts)

    @property
    def specs(self) -> tuple[GemmSpec, GemmSpec]:
        """Of the two kernels."""
        return (
            replace(self.wide, weights=2, epilogue=Epilogue.parse("mul(silu(y0),y1)")),
            replace(self.down, epilogue=Epilogue.parse("add(y0,e0)")),
        )

    def fused(self, x: Tensor, weights: Parts, call: Fused) -> Tensor:
        gate, up, down = weights
        (h,) = call([x, *gate, *up], self.texts[0])
        return call([h, *down, x], self.texts[1])[0]

    def unfused(self, x: Tensor, weights: Parts, call: Fused) -> Tensor:
        gate, up, down = weights
        (a,), (b,) = call([x, *gate], self.texts[2]), call([x, *up], self.texts[2])
        return x + call([silu(a) * b, *down], self.texts[3])[0]

    def decoded(self) -> tuple[Tensor, ...]:
        """In bfloat16, [N, K] each."""
        specs = (self.wide, self.wide, self.down)
        pairs = zip(self.weights, specs, strict=True)
        operator = torch.ops.bitfold.dequantize
        return tuple(operator(list(p), str(s.weight), s.k, torch.bfloat16) for p, s in pairs)


def plain(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    gate, up, down = weights
    return x + linear(silu(linear(x, gate)) * linear(x, up), down)


def jobs(names: Sequence[str], ms: Sequence[int], pick: Chooser) -> Iterator[Job]:
    """Every kernel that the rows need."""
    specs: list[tuple[GemmSpec, bool]] = []
    if MLP in names:
        mlp = Mlp(laid_out(WEIGHT, HIDDEN, WIDTH), laid_out(WEIGHT, WIDTH, HIDDEN), ([], [], []))
        specs += [(spec, False) for spec in (*mlp.specs, mlp.wide, mlp.down)]
    if GROUPED in names:
        one = laid_out(WEIGHT, HIDDEN, WIDTH)
        specs += [(replace(one, experts=EXPERTS), False), (one, True)]
    for spec, shared in specs:
        for m in ms:
            schedule = pick(spec, -(-m // EXPERTS) if shared else m)
            if schedule is not None:
                yield str(spec), str(schedule)


def row_of(peer: str, name: str, m: int, nbytes: int, **more: Any) -> Row:
    """Without its time. products: of all weights' work, what is done, as a token goes to one expert."""
    count, share = (3, 1.0) if name == "MLP" else (EXPERTS, 1 / EXPERTS)
    mine, theirs = (f"{name} {WEIGHT}", []) if peer == OURS else (name, [f"{name} {WEIGHT}"])
    return {
        "peer": peer, "format": mine, "beside": theirs, "compute": "bf16", "n": count * HIDDEN, "k": WIDTH,
        "m": m, "us": None, "error": None, "bytes": nbytes, "products": share, **more,
    }  # fmt: skip


def checked(row: Row, calls: Sequence[Callable[[], Tensor]], want: Tensor, bound: float, repeats: int) -> Row:
    """The row with its error, and its time if the result is right and the same twice."""
    try:
        first = calls[0]().clone()
        row["error"] = float((first.float() - want).norm() / want.norm())
        row["failed"] = None
        if not row["error"] <= bound:
            row["failed"] = f"error {row['error']:.2g} is over {bound:.2g}"
        elif row["peer"] == OURS and not torch.equal(first, calls[0]()):
            row["failed"] = "two runs differ"
        else:
            row["us"] = microseconds(calls, repeats)
    except Exception as refused:  # theirs or Triton's; the row says it
        row["failed"] = repr(refused)[:300]
    return row


def time_mlp(given: argparse.Namespace, report: Callable[[Row], None]) -> None:
    mlp, call = Mlp.of(WEIGHT, WIDTH, HIDDEN, "cuda"), torch.ops.bitfold.fused
    copies = [mlp.weights, *(copied(mlp.weights) for _ in range(copies_past_cache(mlp.nbytes) - 1))]
    dense = [mlp.decoded(), mlp.decoded()]
    decoded = sum(part.nbytes for part in dense[0])

    def fused(x: Tensor, weights: Parts) -> Tensor:
        return mlp.fused(x, weights, call)

    def unfused(x: Tensor, weights: Parts) -> Tensor:
        return mlp.unfused(x, weights, call)

    ways: list[tuple[str, Callable[..., Tensor], Sequence[Any], int]] = [
        (OURS, torch.compile(fused, fullgraph=True), copies, mlp.nbytes),
        ("unfused", torch.compile(unfused, fullgraph=True), copies, mlp.nbytes),
        ("bf16", torch.compile(plain, fullgraph=True), dense, decoded),
    ]
    for m in given.ms:
        x = torch.randn(m, WIDTH, device="cuda", dtype=torch.bfloat16)
        if m > 1:  # compiled once for all M, and once more for one row
            torch._dynamo.mark_dynamic(x, 0)
        want = plain(x.float(), [w.float() for w in dense[0]])
        for peer, run, weights, nbytes in ways:
            row = row_of(peer, "MLP", m, nbytes + 4 * m * WIDTH)
            calls = [partial(run, x, one) for one in weights]
            # Three roundings to bfloat16 one after another, the hidden layer's in two products.
            report(checked(row, calls, want, 4 * BOUND, given.repeats))


def copied(weights: Parts) -> Parts:
    gate, up, down = ([part.clone() for part in parts] for parts in weights)
    return gate, up, down


def time_experts(given: argparse.Namespace, pick: Chooser, report: Callable[[Row], None]) -> None:
    one = laid_out(WEIGHT, HIDDEN, WIDTH)
    spec = replace(one, experts=EXPERTS)
    weights = Weights.of(spec)
    dense = [weights.decoded[0].to(torch.bfloat16) for _ in range(2)]
    for m in given.ms:
        trial = Trial.of(weights, m)
        x, ends = trial.first
        cuts = [0, *ends.tolist()]
        used = sum(b > a for a, b in itertools.pairwise(cuts))
        moved = weights.nbytes * used // EXPERTS + 2 * m * (WIDTH + HIDDEN)
        name, schedule = f"{EXPERTS} experts", str(pick(spec, m))
        row = row_of(OURS, name, m, moved, schedule=schedule)
        report(checked(row, trial.calls(schedule), trial.reference, BOUND, given.repeats))
        loops = [partial(by_loop, one, copy, x, cuts) for copy in weights.copies]
        row = row_of("loop of ours", name, m, moved)
        report(checked(row, loops, trial.reference, BOUND, given.repeats))
        theirs = [partial(grouped, x, w, ends) for w in dense]
        moved = dense[0].nbytes * used // EXPERTS + 2 * m * (WIDTH + HIDDEN)
        row = row_of("grouped_mm bf16", name, m, moved)
        report(checked(row, theirs, trial.reference, BOUND, given.repeats))


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def by_loop(spec: GemmSpec, parts: Sequence[Tensor], x: Tensor, cuts: Sequence[int]) -> Tensor:
    """A kernel for each expert with tokens, into its rows of the result."""
    from bitfold.codegen.triton.run import run
    from bitfold.lowering.fused import by_library

    y = x.new_empty(x.shape[0], spec.n)
    for expert, (a, b) in enumerate(itertools.pairwise(cuts)):
        if a == b:
            continue
        inputs = [x[a:b], *(part[expert] for part in parts)]
        schedule = choose(spec, b - a)
        if schedule is None:
            y[a:b] = by_library(spec, spec.inputs(inputs))
        else:
            run(spec, schedule, inputs, out=y[a:b])
    return y


def time_block(name: str, given: argparse.Namespace, pick: Chooser, report: Callable[[Row], None]) -> None:
    """Rows of one of `BLOCKS`, in this process."""
    torch.cuda.empty_cache()
    if name == MLP:
        time_mlp(given, report)
    else:
        time_experts(given, pick, report)
