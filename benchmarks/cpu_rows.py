"""Products with 2 to 256 rows of x, each beside what a core multiplies at most, and beside what others do.

In: formats, shapes, rows of x, kinds of vectors. Out: a table, and the numbers as JSON.

    python benchmarks/cpu_rows.py --ms 8 16 64 256 --out rows.json
    PYTHON benchmarks/cpu_rows.py --peers 'ONNX Runtime int8 x int8' 'XNNPACK int8 x int8' ..

One thread, one process, in turn. The bound of a product is the rate of its instructions from registers
(`cpu_peaks.cpp`), measured in the same run; of `int8` and `int4[g64]` with float x that of `vfmadd`.
Kernels for AVX-512 add up floats by 64 bytes and integers by 32.
Weights are rotated past the last-level cache only with --rotated; else they lie in it, as those of a small
model do. Peers are those of `cpu_peers.py`, in a python that has them; they quantize x themselves within a
call, ours get it quantized.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from cpu import PAST_CACHE, processor
from cpu_peers import PEERS
from cpu_vectors import in_turn

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp.build import know
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.codegen.cpp.vectors import VECTORS
from bitfold.formats import Quantized, format

FORMATS = ["int8 x int8", "int4[g64] x int8", "int8", "int4[g64]"]
PEAKS = Path(__file__).with_name("cpu_peaks.cpp")
FLOATS = {"avx2": "vfmadd ymm", "avx512vnni": "vfmadd zmm"}
# (vectors, bits of codes that meet int8) -> the instructions that add up most of their products in a cycle.
BOUND = {
    ("avx2", 8): "vpmaddwd vpaddd ymm", ("avx2", 4): "vpmaddubsw vpaddw ymm",
    ("avx512vnni", 8): "vpdpbusd ymm", ("avx512vnni", 4): "vpdpbusd ymm",
}  # fmt: skip


def peaks() -> dict[str, float]:
    """Products a second of a core, by instructions."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        subprocess.run(["g++", "-O3", "-march=native", str(PEAKS), "-o", str(program)], check=True)
        told = subprocess.run([str(program), "0.1"], check=True, capture_output=True, text=True).stdout
    return {name: float(rate) for name, _, rate in (line.rpartition(" ") for line in told.splitlines())}


def row(text: str, n: int, k: int, m: int, given: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of ours by each kind of vectors, and of the peers that compute the same."""
    name, _, of_x = text.partition(" x ")
    activation = format(of_x) if of_x else None
    torch.manual_seed(0)
    x, weight = torch.randn(m, k), torch.randn(n, k) * 0.05
    of_call = [x] if activation is None else list(activation.quantize(x).parts)
    values = x if activation is None else Quantized.from_parts(activation, of_call, k).dequantize()
    q = format(name).quantize(weight)
    exact = values.double() @ q.dequantize(torch.float64).T
    op = torch.ops.bitfold.fused.default
    count = max(2, int(PAST_CACHE / q.nbytes)) if given.rotated else 1
    specs: dict[str, GemmSpec] = {}
    ways: dict[str, Any] = {}
    for kind in given.vectors:
        laid_out = cpu_layout(format(name), k, activation, vectors=VECTORS[kind])
        assert laid_out is not None, text
        specs[kind] = spec = GemmSpec(laid_out, n, k, "f32", activation=activation)
        know([spec], VECTORS[kind])
        parts, said = laid_out.quantize(weight).parts, str(spec)
        (y,) = op([*of_call, *parts], said)
        assert float((y - exact).norm() / exact.norm()) < 1e-5, (text, kind)
        copies = [[part.clone() for part in parts] for _ in range(count)]
        ways[kind] = [lambda p=p, said=said: op([*of_call, *p], said) for p in copies]
    linear = torch.nn.Linear(k, n, bias=False).eval()
    for peer in given.peers:
        if PEERS[peer][1] == text:
            ways[peer] = PEERS[peer][0](text, linear, x, min(count, 40))
    if text == FORMATS[0]:
        ways["float32 by torch"] = [lambda: torch.nn.functional.linear(x, linear.weight)]
    found = in_turn(
        ways, lambda way: know([specs[way]], VECTORS[way]) if way in specs else None, given.seconds
    )
    return {"format": text, "n": n, "k": k, "m": m, "us": {way: 1e6 * s for way, s in found.items()}}


def share(one: dict[str, Any], way: str, most: dict[str, float]) -> float | None:
    """Of what its instructions multiply at most, by one thread."""
    weight, _, of_x = one["format"].partition(" x ")
    bound = BOUND.get((way, format(weight).element.bits)) if of_x else FLOATS.get(way)
    rate = 1e6 * one["n"] * one["k"] * one["m"] / one["us"][way]
    return rate / most[bound] if bound in most else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", nargs="+", default=["avx2", "avx512vnni"])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "1536x576"])
    parser.add_argument("--ms", nargs="+", type=int, default=[8, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=0.2, help="for each way of each row")
    parser.add_argument("--rotated", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    most = peaks()
    about = {"machine": processor(), "torch": torch.__version__, "threads": 1, "products_a_second": most}
    print(about, flush=True)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for n, k in (map(int, shape.split("x")) for shape in given.shapes):
            for m in given.ms:
                for text in given.formats:
                    one = row(text, n, k, m, given)
                    one["share"] = {way: share(one, way, most) for way in one["us"]}
                    rows.append(one)
                    shown = []
                    for way, us in one["us"].items():
                        part = one["share"][way]
                        of_most = f" ({part:.0%})" if part is not None else ""
                        shown.append(f"{way} {1e-3 * n * k * m / us:6.1f} G/s{of_most}")
                    print(f"{text:17} {n}x{k} M={m:<4} {'  '.join(shown)}", flush=True)
                if given.out:
                    written = json.dumps({**about, "rotated": given.rotated, "rows": rows}, indent=1) + "\n"
                    beside = given.out.with_suffix(".new")
                    beside.write_text(written, encoding="utf-8")
                    beside.replace(given.out)


if __name__ == "__main__":
    main()
