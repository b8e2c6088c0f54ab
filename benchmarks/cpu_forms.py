"""Time of one linear on codes through Inductor's C++, next to the float32 one, for the shapes of SmolLM2.

In: options. Out: a table of microseconds, and the numbers as JSON in benchmarks/results/cpu_forms.json.

    python benchmarks/cpu_forms.py --shapes 576x576 1536x576 --formats int8 q4_1 --rows 1 8

One thread, processor time, the best of twelve runs, over copies of the weight that together exceed the caches
(as the layers of a model do). The result is checked against the decoded weight before it is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitfold as bf
from bitfold.lowering.cpu.forms import vector_layout
from bitfold.lowering.tolerance import bound

RESULTS = Path(__file__).parent / "results" / "cpu_forms.json"
SHAPES = ["576x576", "1536x576", "576x1536", "49152x576", "4096x4096"]
FORMATS = [
    "int8", "int8[g64]", "int4[g32]", "int4[g64]", "q4_1", "int3[g64]", "int2[g64]", "ternary",
    "float8_e4m3fn", "mxfp6_e2m3", "mxfp4", "nvfp4", "nf4[g64]",
]  # fmt: skip
BEYOND_CACHES = 100e6  # bytes


def best(call: Callable[[Any], Any], given: Sequence[Any]) -> float:
    """Microseconds of one call."""
    for one in given[:3]:
        call(one)
    started = time.perf_counter()
    call(given[0])
    repeats = max(1, int(0.02 / (time.perf_counter() - started)))
    found = []
    for round_ in range(12):
        started = time.process_time()
        for i in range(repeats):
            call(given[(round_ * repeats + i) % len(given)])
        found.append((time.process_time() - started) / repeats)
    return min(found) * 1e6


def copies(make: Callable[[], Any], size: int) -> list[Any]:
    return [make() for _ in range(max(1, min(200, int(BEYOND_CACHES / size))))]


def float32(x: Tensor, weight: Tensor) -> float:
    call = torch.compile(torch.nn.functional.linear, dynamic=False)
    return best(lambda w: call(x, w), copies(weight.clone, weight.nbytes))


def codes(x: Tensor, weight: Tensor, text: str) -> float:
    fmt = bf.format(text)
    k = weight.shape[1]
    fmt = fmt.with_layout(vector_layout(fmt, k) or fmt.layout)
    q, spelled = fmt.quantize(weight), str(fmt)

    def linear(x: Tensor, parts: list[Tensor]) -> Tensor:
        return torch.ops.bitfold.cpu_linear(x, parts, spelled, k)

    call = torch.compile(linear, dynamic=False)
    exact = x.double() @ q.dequantize().double().t()
    assert ((call(x, q.parts) - exact).abs() <= bound(x, q.dequantize())).all(), text
    return best(lambda p: call(x, p), copies(lambda: [part.clone() for part in q.parts], q.nbytes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    print(f"{'shape':>12} {'batch':>5} {'float32':>9} " + " ".join(f"{name:>13}" for name in given.formats))
    for shape in given.shapes:
        n, k = map(int, shape.split("x"))
        weight = torch.randn(n, k)
        for m in given.rows:
            x = torch.randn(m, k)
            with torch.inference_mode():
                torch._dynamo.reset()
                row: dict[str, Any] = {"shape": shape, "batch": m, "float32": float32(x, weight)}
                for name in given.formats:
                    torch._dynamo.reset()
                    row[name] = codes(x, weight, name)
            rows.append(row)
            print(
                f"{shape:>12} {m:5} {row['float32']:9.0f} "
                + " ".join(f"{row[name]:13.0f}" for name in given.formats),
                flush=True,
            )
    given.out.write_text(json.dumps({"unit": "microseconds, one thread", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
