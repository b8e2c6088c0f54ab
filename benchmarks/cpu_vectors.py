"""The same products by two kinds of vectors in one process, turn by turn: what AMX gains on AVX-512 VNNI.

In: formats, shapes, rows of x, two kinds of vectors. Out: a table, and the numbers as JSON.

    python benchmarks/cpu_vectors.py --vectors amx avx512vnni --ms 1 16 64 256 1024 --out vectors.json

Weights are rotated past the last-level cache; rounds of either kind follow each other, and of each the best
counts. Beside them float32 and bfloat16 by torch (oneDNN, which has AMX for bfloat16), and `_int_mm`,
which takes more than 16 rows. Each
product is checked against float64 first. `amx_model` in place of amx tells nothing of time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cpu import PAST_CACHE, processor, read_bandwidth
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp.build import know
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.codegen.cpp.vectors import VECTORS, widest
from bitfold.formats import Quantized, format

FORMATS = ["int8 x int8", "int8", "int4[g128]", "int4[g64]", "int4[g64] x int8"]
PEERS = ("float32", "bfloat16", "_int_mm")
Call = Callable[[], Any]


def in_turn(
    ways: dict[str, Sequence[Call]], begin: Callable[[str], None], seconds: float
) -> dict[str, float]:
    """Seconds of a call of each way: the best of rounds that follow each other, way after way."""
    found = dict.fromkeys(ways, float("inf"))
    least = 0.01  # of a round: what comes before it is no part of it
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end:
        for way, calls in ways.items():
            begin(way)
            calls[0]()
            started, count = time.perf_counter(), 0
            while count < len(calls) or time.perf_counter() - started < least:
                calls[count % len(calls)]()
                count += 1
            found[way] = min(found[way], (time.perf_counter() - started) / count)
    return found


def copies(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """The same parts of a weight so often that they do not stay in a cache."""
    size = sum(part.nbytes for part in parts)
    return [[part.clone() for part in parts] for _ in range(max(2, int(PAST_CACHE / size)))]


def fits(text: str, k: int) -> bool:
    """Whether the groups of a format divide a row."""
    cols = format(text.partition(" x ")[0]).cols
    return cols is None or k % cols == 0


def row(text: str, n: int, k: int, m: int, given: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of a product by each kind of vectors."""
    name, _, of_x = text.partition(" x ")
    activation = format(of_x) if of_x else None
    laid_out = cpu_layout(format(name), k, activation)
    assert laid_out is not None, text
    spec = GemmSpec(laid_out, n, k, "f32", activation=activation)
    x, q = torch.randn(m, k), laid_out.quantize(torch.randn(n, k) * 0.05)
    of_call = [x] if activation is None else list(activation.quantize(x).parts)
    op, said = torch.ops.bitfold.fused.default, str(spec)
    values = x if activation is None else Quantized.from_parts(activation, of_call, k).dequantize()
    exact = values.double() @ q.dequantize(torch.float64).T
    errors = {}
    for kind in given.vectors:
        know([spec], VECTORS[kind])
        (y,) = op([*of_call, *q.parts], said)
        errors[kind] = float((y - exact).norm() / exact.norm())
        assert errors[kind] < 1e-5, (text, kind, errors)
    parts = copies(q.parts)
    calls = [lambda p=p: op([*of_call, *p], said) for p in parts]
    found = in_turn(
        dict.fromkeys(given.vectors, calls), lambda kind: know([spec], VECTORS[kind]), given.seconds
    )
    us = {kind: 1e6 * seconds for kind, seconds in found.items()}
    return {"format": text, "n": n, "k": k, "m": m, "us": us, "bytes": q.nbytes, "errors": errors}


def peer(name: str, n: int, k: int, m: int, seconds: float) -> dict[str, Any]:
    """Microseconds of torch's own product."""
    x, weight = torch.randn(m, k), torch.randn(n, k)
    if name == "_int_mm":
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        parts = copies([torch.randint(-128, 128, (n, k), dtype=torch.int8)])
        calls = [lambda w=w: torch._int_mm(x, w.T) for (w,) in parts]
    else:
        x = x.to(getattr(torch, name))
        parts = copies([weight.to(x.dtype)])
        calls = [lambda w=w: torch.nn.functional.linear(x, w) for (w,) in parts]
    size = sum(part.nbytes for part in parts[0])
    found = in_turn({name: calls}, lambda _: None, seconds)
    return {"format": name, "n": n, "k": k, "m": m, "us": {"torch": 1e6 * found[name]}, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", nargs="+", choices=list(VECTORS), default=["amx", "avx512vnni"])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "1536x576"])
    parser.add_argument("--ms", nargs="+", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="for each kind of each row")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    about = {
        "machine": processor(), "torch": torch.__version__, "threads": given.threads, "here": widest().name,
        "read": read_bandwidth(),
    }  # fmt: skip
    print(about, flush=True)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for n, k in (map(int, shape.split("x")) for shape in given.shapes):
            for m in given.ms:
                torch.manual_seed(0)
                new = [row(text, n, k, m, given) for text in given.formats if fits(text, k)]
                new += [
                    peer(name, n, k, m, given.seconds) for name in given.peers if name != "_int_mm" or m > 16
                ]
                rows += new
                for one in new:
                    times = "  ".join(f"{kind} {us:9.1f} us" for kind, us in one["us"].items())
                    rate = 2e-6 * n * k * m / min(one["us"].values())
                    gain = list(one["us"].values())
                    more = f"{gain[-1] / gain[0]:6.2f}x" if len(gain) > 1 else ""
                    print(f"{one['format']:18} {n}x{k} M={m:<5} {times} {more} {rate:7.2f} Tops", flush=True)
                if given.out:
                    text = json.dumps({**about, "rows": rows}, indent=1) + "\n"
                    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
