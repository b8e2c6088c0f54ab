"""What a step of training on rounded numbers costs: time and memory against the float step, and torchao's.

In: sizes. Out: a JSON, and a line for each way: milliseconds of a step (the median), peak memory, and both
over the unquantized step's, all in one run, compiled by torch.compile.

    python benchmarks/qat_step.py --processes 8    on a GPU: Llama-shaped blocks, d 4096, sequence 2048, bf16
    python benchmarks/qat_step.py --width 256 --sequence 32 --steps 2 --rounds 1 --out out/try    on a CPU

A step is forward, backward and SGD, whose update is the same for all. A block is compiled, once for all
blocks. `--processes` compiles the ways beforehand, several at a time, into a cache on disk. All ways are
made first, then timed in turns, there and back: one after the other, the same kernels took 21.7 ms in one run
and 24.0 in another, where they came right behind the float step. The unquantized step is among them twice;
quotients are over the faster.
Memory is what the model's parameters take and what one step takes beside them at most.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qat_report import RESULTS, device_word, write
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes.rules import Rule


class Block(nn.Module):
    """Attention and a gated MLP of Llama's proportions, without positions, which cost the same either way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(3.5 * width)
        self.heads = max(width // 128, 4)
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, width // 4, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q = self.q_proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (p(y).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


def ours(weight: str, activation: str, gradient: str) -> Callable[[nn.Module], nn.Module]:
    """A way: linears prepared by a recipe."""
    recipe = bf.Recipe("qat", (Rule(weight=weight, input=activation),))
    return lambda model: bf.prepare_qat(model, recipe, bf.Qat(gradient))


def torchao(model: nn.Module, *, activations: bool) -> nn.Module:
    """torchao's int4 weights, with int8 activations or floats, as it prepares them."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return model


BREAKING = ("torchao int4[g32]", "torchao int4[g32] x int8")
"""What may fall into several graphs: under torch 2.11 it does not compile otherwise."""

UNQUANTIZED, AGAIN = "unquantized", "unquantized again"
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    UNQUANTIZED: lambda model: model,
    "int4[g32]": ours("int4[g32]", "", "straight"),  # on a GPU by a kernel of its own
    "int4[g32] fused": ours("int4[g32]", "", "straight+fused"),
    "int4[g32] kept": ours("int4[g32]", "", "straight+keep"),
    "int4[g32] lsq": ours("int4[g32]", "", "lsq"),
    "int4[g32] lsq kernel": ours("int4[g32]", "", "lsq+kernel"),
    "int4[g32] x int8": ours("int4[g32]", "int8", "straight"),
    "mxfp4 x mxfp8": ours("mxfp4", "mxfp8", "straight"),
    "torchao int4[g32]": partial(torchao, activations=False),
    "torchao int4[g32] x int8": partial(torchao, activations=True),
    AGAIN: lambda model: model,
}


class Way:
    """One compiled model and its steps."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        cuda = torch.cuda.is_available()
        device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
        torch.manual_seed(0)
        blocks = nn.Sequential(*(Block(given.width) for _ in range(given.blocks))).to(device, dtype)
        self.x = torch.randn(given.batch, given.sequence, given.width, device=device, dtype=dtype)
        self.model = WAYS[name](blocks).train()
        for block in blocks:
            block.compile(fullgraph=name not in BREAKING, dynamic=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.rounds: list[list[float]] = []
        self.memory_taken: int | None = None
        self.ready_seconds = 0.0

    @property
    def seconds(self) -> list[float]:
        return [second for one in self.rounds for second in one]

    def run(self) -> None:
        self.model(self.x).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, steps: int) -> None:
        self.run()  # behind another way, with nothing of this one's in the caches
        found = []
        for _ in range(steps):
            _synchronize()
            start = time.perf_counter()
            self.run()
            _synchronize()
            found.append(time.perf_counter() - start)
        self.rounds.append(found)

    def memory(self) -> int | None:
        """Bytes of parameters, and of a step at its peak."""
        if not torch.cuda.is_available():
            return None
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        self.run()
        peak = torch.cuda.max_memory_allocated() - held
        return peak + sum(parameter.nbytes for parameter in self.model.parameters())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiled(name: str, given: argparse.Namespace) -> str:
    """Run a way once, in a process of its own, so that its kernels are on disk; what went wrong, or ''."""
    try:
        Way(name, given).run()
    except Exception as error:
        return _said(error)
    return ""


def _said(error: Exception) -> str:
    """Its first lines: Dynamo's say first that, and then what, it does not take."""
    return f"{type(error).__name__}: {' '.join(' '.join(str(error).splitlines()[:6]).split())}"


def ready(name: str, given: argparse.Namespace) -> Way | dict[str, Any]:
    """A way that has run, with what it takes; or the row of one that does not run."""
    began = time.perf_counter()
    try:
        way = Way(name, given)
        for _ in range(3):
            way.run()
        way.memory_taken = way.memory()
    except Exception as error:
        if name.startswith(UNQUANTIZED):
            raise  # there is nothing to compare with
        return {"way": name, "absent": _said(error)}
    way.ready_seconds = time.perf_counter() - began
    return way


def row_of(name: str, way: Way) -> dict[str, Any]:
    """One way, timed."""
    return {
        "way": name,
        "milliseconds": 1e3 * statistics.median(way.seconds),
        "rounds": [1e3 * statistics.median(part) for part in way.rounds],
        "memory": way.memory_taken,
        "ready_seconds": round(way.ready_seconds, 1),
    }


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    names = given.way or [name for name in WAYS if not name.startswith(UNQUANTIZED)]
    # Blocks of all ways are one class: each adds an entry to what is compiled of its forward.
    torch._dynamo.config.recompile_limit = 8 * len(WAYS)
    if given.processes > 1:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
        with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
            waiting = {name: pool.submit(compiled, name, given) for name in [UNQUANTIZED, *names]}
            wrong = {name: said for name, one in waiting.items() if (said := one.result())}
        print("compiled beforehand", wrong, flush=True)
    ways = {name: ready(name, given) for name in [UNQUANTIZED, *names, AGAIN]}
    running = [way for way in ways.values() if isinstance(way, Way)]
    for turn in range(given.rounds):
        # There and back, so that what comes first, or behind a costly one, is not always the same.
        for way in running if turn % 2 == 0 else reversed(running):
            way.timed(given.steps)
    rows = [row_of(name, way) if isinstance(way, Way) else way for name, way in ways.items()]
    floats = [row for row in rows if row["way"].startswith(UNQUANTIZED)]
    least = min(row["milliseconds"] for row in floats)
    for row in rows:
        if "milliseconds" in row:
            row["time_ratio"] = row["milliseconds"] / least
            row["memory_ratio"] = None if row["memory"] is None else row["memory"] / floats[0]["memory"]
        print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| | ms a step | of the float step | memory |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "absent" in row:
            lines.append(f"| {row['way']} | absent: {row['absent']} | | |")
            continue
        memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}x"
        lines.append(f"| {row['way']} | {row['milliseconds']:.2f} | {row['time_ratio']:.2f}x | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1, help="that compile beforehand")
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = measure(given)
    options = {name: str(value) for name, value in vars(given).items()}
    record = {"torch": torch.__version__, "card": device_word(), "options": options, "rows": rows}
    write(given.out / f"qat-step-{device_word()}.json", record)
    print(table(rows))


if __name__ == "__main__":
    main()
