"""How long GPTQ takes on one layer of a Llama of 8 B parameters: its seven matrices, from shapes alone.

In: nothing but the shapes. Out: seconds for each matrix and their sum, in JSON if asked.

    python benchmarks/gptq_time.py --out benchmarks/results/gptq-time-nvidia-h200.json        on a GPU
    python benchmarks/gptq_time.py --divide 16                                                 small, on a CPU

Weights are normal numbers; inputs have a few strong directions, 4096 tokens of them. Measuring the inputs (a
product) is counted too: it belongs to the algorithm. The first matrix is run once before, for the libraries
to start.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import bitfold as bf
from bitfold.lowering.algorithms.algorithm import algorithm_of
from bitfold.passes.algorithms.draft import Draft
from bitfold.passes.algorithms.inputs import Inputs
from bitfold.passes.algorithms.solve import Solver, Task
from bitfold.tools.demo import environment

SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


def main() -> int:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = [step for step in algorithm_of(arguments.algorithm).solve.passes if isinstance(step, Solver)]
    sizes = {name: (n // arguments.divide, k // arguments.divide) for name, (n, k) in SHAPES.items()}
    seconds = {"": _solve(*sizes["q_proj"], steps, arguments.format, device)}
    for name, (n, k) in sizes.items():
        seconds[name] = _solve(n, k, steps, arguments.format, device)
        print(f"{name:10} [{n}, {k}]  {seconds[name]:.2f} s", flush=True)
    del seconds[""]
    total = sum(seconds.values())
    print(f"{arguments.algorithm} in {arguments.format}: {total:.2f} s for the layer")
    record = {
        "where": environment(device),
        "algorithm": arguments.algorithm,
        "format": arguments.format,
        "shapes": sizes,
        "seconds": seconds,
        "total": total,
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _solve(n: int, k: int, steps: list[Solver], text: str, device: torch.device) -> float:
    torch.manual_seed(0)
    weight, x = torch.randn(n, k, device=device), _activations(k, device)
    _wait(device)
    began = time.perf_counter()
    inputs = Inputs(k, device)
    inputs.add(x)
    draft, fmt = Draft(weight), bf.format(text)
    for step in steps:
        draft = step.solve(Task("layer", fmt, draft, inputs))
    draft.quantized(fmt)
    _wait(device)
    return time.perf_counter() - began


def _activations(k: int, device: torch.device) -> Tensor:
    mix = torch.randn(k // 16, k, device=device)
    return torch.randn(4096, k // 16, device=device) @ mix + torch.randn(4096, k, device=device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", default="clip,gptq", help="solvers, as bf.quantize takes them")
    parser.add_argument("--format", default="int4[g128]")
    parser.add_argument("--divide", type=int, default=1, help="sizes divided by this, to try the script")
    parser.add_argument("--out", help="a JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
