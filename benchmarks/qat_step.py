"""What a step of training on rounded numbers costs: time and memory against the float step, and torchao's.

In: sizes. Out: a JSON, and a line for each way: milliseconds of a step (the median), peak memory, and both
over the unquantized step's, all in one run, compiled by torch.compile.

    python benchmarks/qat_step.py       on a GPU: Llama-shaped blocks, d 4096, sequence 2048, bfloat16
    python benchmarks/qat_step.py --width 128 --sequence 32 --steps 2 --out out/try     on a CPU, to try it

A step is forward, backward and SGD, whose update is the same for all. The unquantized step is timed first and
last; the quotients are over the faster of the two.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitfold as bf
from bitfold.passes.rules import Rule

RESULTS = Path(__file__).parent / "results"


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


def torchao(model: nn.Module) -> nn.Module:
    """torchao's int4 weights with int8 activations, as it prepares them."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "unquantized": lambda model: model,
    "int4[g32]": ours("int4[g32]", "", "straight"),
    "int4[g32] lsq": ours("int4[g32]", "", "lsq"),
    "int4[g32] x int8": ours("int4[g32]", "int8", "straight"),
    "mxfp4 x mxfp8": ours("mxfp4", "mxfp8", "straight"),
    "torchao int4[g32] x int8": torchao,
    "unquantized again": lambda model: model,
}


class Way:
    """One compiled model and its steps."""

    def __init__(self, prepare: Callable[[nn.Module], nn.Module], model: nn.Module, x: Tensor) -> None:
        self.x, self.model = x, prepare(copy.deepcopy(model)).train()
        self.step = torch.compile(self.model, fullgraph=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.seconds: list[float] = []

    def run(self) -> None:
        self.step(self.x).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, steps: int) -> None:
        for _ in range(steps):
            _synchronize()
            start = time.perf_counter()
            self.run()
            _synchronize()
            self.seconds.append(time.perf_counter() - start)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = nn.Sequential(*(Block(given.width) for _ in range(given.blocks))).to(device, dtype)
    x = torch.randn(given.batch, given.sequence, given.width, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    for name, prepare in WAYS.items():
        try:
            way = Way(prepare, model, x)
            way.run()
            way.run()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if device == "cuda" else 0
            way.run()
            peak = torch.cuda.max_memory_allocated() - held if device == "cuda" else None
            for _ in range(given.rounds):
                way.timed(given.steps)
            parameters = sum(parameter.nbytes for parameter in way.model.parameters())
            rows.append(
                {
                    "way": name,
                    "milliseconds": 1e3 * statistics.median(way.seconds),
                    "spread": 1e3 * statistics.pstdev(way.seconds),
                    "memory": None if peak is None else peak + parameters,
                }
            )
        except Exception as error:
            if name.startswith("unquantized"):
                raise  # there is nothing to compare with
            rows.append({"way": name, "absent": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        way = None  # type: ignore[assignment]
        torch._dynamo.reset()
        gc.collect()
        print(rows[-1], flush=True)
    floats = [row for row in rows if row["way"].startswith("unquantized")]
    least = min(row["milliseconds"] for row in floats)
    for row in rows:
        if "milliseconds" in row:
            row["time_ratio"] = row["milliseconds"] / least
            row["memory_ratio"] = None if row["memory"] is None else row["memory"] / floats[0]["memory"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = measure(given)
    card = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    options = {name: str(value) for name, value in vars(given).items()}
    given.out.mkdir(parents=True, exist_ok=True)
    beside = given.out / f"qat-step-{card}.part.json"
    beside.write_text(json.dumps({"torch": torch.__version__, "options": options, "rows": rows}, indent=1))
    beside.replace(given.out / f"qat-step-{card}.json")


if __name__ == "__main__":
    main()
