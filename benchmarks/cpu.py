"""Quantized products and decoding on a CPU, against float32, in one run: ratios, and bytes against the roof.

In: options. Out: tables, and the numbers as JSON.

    python benchmarks/cpu.py --shapes 4096x4096 --ms 1 8 64 --formats int8 'int4[g64]' --out cpu.json
    python benchmarks/cpu.py --decode float32 int8_all 'int4[g64]' int8_dynamic

One process each, with so many threads. Weights are rotated past the last-level cache; of the repeats the best
counts, as other programs only ever add time. The roof is reading float32 numbers with the same threads.
Decoding is SmolLM2's shape with random numbers: a step of a static cache of 128 tokens, every layer through
one compiled function, by Inductor in float32, by backend="bitfold" on a quantized model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

FLOAT = "float32"
FORMATS = ["int8", "int4[g64]", "int4[g128]", "int3[g64]", "mxfp4", "nf4[g64]", "fp8", "int8 x int8"]
NAMES = {"fp8": "float8_e4m3fn"}
PAST_CACHE = 300e6  # bytes
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip


def best(calls: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Seconds of one call: the best round over all of them."""
    for call in calls:
        call()
    found, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        for call in calls:
            call()
        found = min(found, (time.perf_counter() - started) / len(calls))
    return found


def read_bandwidth() -> float:
    """Bytes a second of the larger of two reductions over 512 MiB."""
    big = torch.randn(1 << 27)
    return big.nbytes / min(best([lambda: big.sum()], 2.0), best([lambda: big.amax()], 2.0))


def linear(text: str, n: int, k: int, m: int, seconds: float) -> dict[str, Any]:
    """A row: microseconds and bytes of one product."""
    x, weight = torch.randn(m, k), torch.randn(n, k) * 0.05
    row: dict[str, Any] = {"format": text, "n": n, "k": k, "m": m}
    if text == FLOAT:
        copies = [weight.clone() for _ in range(max(2, int(PAST_CACHE / weight.nbytes)))]
        calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in copies]
        return row | {"bytes": weight.nbytes, "us": best(calls, seconds) * 1e6}
    from bitfold.codegen import GemmSpec
    from bitfold.codegen.cpp.build import know
    from bitfold.codegen.cpp.support import cpu_layout
    from bitfold.formats import Quantized, format

    name, _, of_x = text.partition(" x ")
    activation = format(of_x) if of_x else None
    laid_out = cpu_layout(format(NAMES.get(name, name)), k, activation)
    assert laid_out is not None, text
    spec = GemmSpec(laid_out, n, k, "f32", activation=activation)
    know([spec])
    q = laid_out.quantize(weight)
    given = [x] if activation is None else activation.quantize(x).parts
    op, said = torch.ops.bitfold.fused.default, str(spec)
    (y,) = op([*given, *q.parts], said)
    values = x if activation is None else Quantized.from_parts(activation, given, k).dequantize()
    exact = values.double() @ q.dequantize(torch.float64).T
    row["error"] = float((y - exact).norm() / exact.norm())
    assert row["error"] < 1e-5, row
    parts = [[part.clone() for part in q.parts] for _ in range(max(2, int(PAST_CACHE / q.nbytes)))]
    calls = [lambda p=p: op([*given, *p], said) for p in parts]
    return row | {"bytes": q.nbytes, "us": best(calls, seconds) * 1e6}


def decoding(recipe: str, steps: int) -> dict[str, Any]:
    """A row: milliseconds of a step of decoding, and seconds until the second step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import bitfold as bf
    from bitfold.tools.measure import decode

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval()
    if recipe != FLOAT:
        bf.quantize(model, recipe)
    found = decode(model, torch.randint(0, 49152, (1, 16)), steps=steps)
    return {
        "recipe": recipe,
        "ms": 1e3 / found.tokens_per_second,
        "compile_s": found.compile_seconds,
        "weights": sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
    }


def child(given: argparse.Namespace) -> None:
    """One process: its rows as the last line."""
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        if given.one == "roof":
            rows: Any = [{"read": read_bandwidth()}]
        elif given.decode:
            rows = [decoding(given.one, given.steps)]
        else:
            shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
            rows = [linear(given.one, n, k, m, given.seconds) for n, k in shapes for m in given.ms]
    print(json.dumps(rows))


def run(one: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", one, "--threads", str(given.threads)]
    command += ["--shapes", *given.shapes, "--ms", *map(str, given.ms), "--seconds", str(given.seconds)]
    command += ["--steps", str(given.steps), *(["--decode", *given.decode] if given.decode else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peers() -> list[str]:
    from cpu_peers import PEERS

    return list(PEERS)


def peer(one: str, given: argparse.Namespace, absent: dict[str, str]) -> list[dict[str, Any]]:
    """The same by `cpu_peers.py`; nothing, and why in `absent`, where that fails."""
    command = [given.peers, "-W", "ignore", str(Path(__file__).with_name("cpu_peers.py")), "--one", one]
    command += ["--threads", str(given.threads), "--shapes", *given.shapes]
    command += ["--ms", *map(str, given.ms), "--seconds", str(given.seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        absent[one] = (done.stderr.strip().splitlines() or ["failed"])[-1][:200]
        print(f"{one}: absent, {absent[one]}", flush=True)
        return []
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "1536x576"])
    parser.add_argument("--ms", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--decode", nargs="+", default=[], help="recipes, instead of single products")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", help="a python with torchao, onnxruntime, onnx and executorch")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        child(given)
        return
    read = run("roof", given)[0]["read"]
    machine = {"machine": processor(), "torch": torch.__version__, "threads": given.threads, "read": read}
    print(f"{machine['machine']}, {given.threads} threads, reads {read / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    beside = _peers() if given.peers and not given.decode else []
    for one in given.decode or [FLOAT, *given.formats, *beside]:
        new = run(one, given) if one not in beside else peer(one, given, absent)
        if not new:
            continue
        rows += new
        if given.out:
            given.out.write_text(
                json.dumps({**machine, "absent": absent, "rows": rows}, indent=1) + "\n", encoding="utf-8"
            )
        _show(rows, rows[-1:] if given.decode else rows[-len(given.ms) * len(given.shapes) :], read)


def _show(rows: list[dict[str, Any]], new: list[dict[str, Any]], read: float) -> None:
    for row in new:
        if "recipe" in row:
            base = next((r["ms"] for r in rows if r["recipe"] == FLOAT), row["ms"])
            print(
                f"{row['recipe']:14} {row['ms']:7.2f} ms a token, "
                f"{base / row['ms']:.2f}x of float32, compiled in {row['compile_s']:.0f} s",
                flush=True,
            )
            continue
        same = [r for r in rows if (r["n"], r["k"], r["m"]) == (row["n"], row["k"], row["m"])]
        base = next((r["us"] for r in same if r["format"] == FLOAT), row["us"])
        print(
            f"{row['format']:14} {row['n']}x{row['k']} M={row['m']:<4} {base / row['us']:6.2f}x of float32, "
            f"{row['bytes'] / row['us'] * 1e6 / read:6.1%} of the roof",
            flush=True,
        )


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
