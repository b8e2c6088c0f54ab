"""Bytes a second of kernels on one row of x beside reading alone, in pages of 4 KiB and of 2 MiB.

In: a shape, formats. Out: GB/s of each and its share of reading, and with --out the numbers as JSON.

    python benchmarks/cpu_pages.py 14336x4096 --formats int8 'int4[g64]' --threads 2 --out pages.json

Reading alone is `read_pages.cpp`, by two threads whatever --threads is. Kernels ask for large pages when they
first see a weight (`headers/pages.h`); memory is kept from it here by MADV_NOHUGEPAGE, which is looked at,
then asked for. Weights past the last level of cache. In turns, for a machine whose memory others use too:
in each round reading, then each kernel; shares are of the same round. Linux 6.1 or newer, and AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cpu import PAST_CACHE, best, processor
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp.build import know
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.codegen.cpp.vectors import widest
from bitfold.formats import format

FORMATS = ["int8", "int4[g128]", "int4[g64]", "int3[g128]", "int3[g64]", "mxfp4", "nvfp4"]
WARM = 0.2  # seconds
PAGE = 2 << 20
NO_LARGE, LARGE, COLLAPSE = 15, 14, 25  # MADV_NOHUGEPAGE, MADV_HUGEPAGE, MADV_COLLAPSE


def advise(tensor: Tensor, advice: int) -> None:
    """For whole pages of 2 MiB within a tensor; a refusal is passed over, as the kernels do."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    first = -(-tensor.data_ptr() // PAGE) * PAGE
    last = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    if first < last:
        libc.madvise(first, last - first, advice)


def in_large_pages(tensors: list[Tensor]) -> int:
    """Bytes in pages of 2 MiB of the mappings that hold whole such pages of tensors."""
    starts = [-(-tensor.data_ptr() // PAGE) * PAGE for tensor in tensors if tensor.nbytes >= 2 * PAGE]
    found, within = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            within = any(begin <= start < end for start in starts)
        elif within and first == "AnonHugePages:":
            found += int(rest.split()[0]) << 10
    return found


@cache
def reader() -> tempfile.TemporaryDirectory[str]:
    """A folder with the program `read`."""
    folder = tempfile.TemporaryDirectory()
    text = Path(__file__).with_name("read_pages.cpp")
    told = [
        "g++",
        "-O3",
        "-march=x86-64-v3",
        "-std=c++17",
        str(text),
        "-o",
        f"{folder.name}/read",
        "-lpthread",
    ]
    subprocess.run(told, check=True)
    return folder


def reading() -> dict[str, float]:
    """Bytes a second of reading alone."""
    program = Path(reader().name) / "read"
    small, large = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return {"small": float(small), "large": float(large)}


class Product:
    """One format's kernel on one row of x, by turns on copies of its weights past the last level of cache."""

    def __init__(self, text: str, n: int, k: int) -> None:
        laid_out = cpu_layout(format(text), k)
        assert laid_out is not None, text
        spec = GemmSpec(laid_out, n, k, "f32")
        know([spec])
        x, q = torch.randn(1, k), laid_out.quantize(torch.randn(n, k) * 0.05)
        copies = [[part.clone() for part in q.parts] for _ in range(max(1, int(PAST_CACHE / 2 / q.nbytes)))]
        self.calls = [lambda p=p: torch.ops.bitfold.fused([x, *p], str(spec)) for p in copies]
        self.tensors = [part for parts in copies for part in parts]
        self.row: dict[str, Any] = {
            "format": text,
            "n": n,
            "k": k,
            "bytes": q.nbytes,
            "small": [],
            "large": [],
        }
        self.advise(NO_LARGE)

    def advise(self, advice: int) -> None:
        for tensor in self.tensors:
            advise(tensor, advice)

    def measure(self, pages: str, seconds: float) -> None:
        """A round: bytes a second, once both threads run: one may have slept, on the other's core."""
        best(self.calls, WARM)
        self.row[pages].append(self.row["bytes"] / best(self.calls, seconds))


def measured(products: list[Product], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Bytes a second of reading alone, in each round; products, in turns with it, keep theirs."""
    alone: dict[str, list[float]] = {"small": [], "large": []}
    for pages in ("small", "large"):
        for _ in range(rounds):
            alone[pages].append(reading()[pages])
            for product in products:
                product.measure(pages, seconds / rounds)
        for product in products:
            held = product.row[f"bytes_in_large_pages_{pages}"] = in_large_pages(product.tensors)
            if pages == "small" and held:
                raise SystemExit("memory that was to lie in small pages does not; nothing was measured")
            product.advise(LARGE)
            product.advise(COLLAPSE)
    return alone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each product, in all rounds")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    n, k = map(int, given.shape.split("x"))
    with torch.inference_mode():
        products = [Product(text, n, k) for text in given.formats]
        alone = measured(products, given.rounds, given.seconds)
    record: dict[str, Any] = {
        "machine": processor(),
        "torch": torch.__version__,
        "vectors": str(widest()),
        "threads": given.threads,
        "read": alone,
        "rows": [product.row for product in products],
    }
    print("reading alone, GB/s:", *(f"{name} {max(alone[name]) / 1e9:.1f}" for name in alone))
    for row in record["rows"]:
        said = [
            f"{name} {max(row[name]) / 1e9:5.1f} GB/s, {share(row[name], alone[name]):.0%} of reading"
            for name in alone
        ]
        print(f"{row['format']:12}", *said)
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def share(of: list[float], alone: list[float]) -> float:
    """The median over rounds of what a kernel reads of what reading alone does in the same round."""
    return statistics.median(a / b for a, b in zip(of, alone, strict=True))


if __name__ == "__main__":
    main()
