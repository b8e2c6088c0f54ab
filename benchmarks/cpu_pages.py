"""What pages of 2 MiB are worth: reading alone, and kernels on one row of x, in small and in large pages.

In: a shape, formats. Out: GB/s of each in both kinds of page, and with --out the numbers as JSON.

    python benchmarks/cpu_pages.py 14336x4096 --formats int8 'int4[g64]' --threads 2 --out pages.json

Reading alone is `read_pages.cpp`, by two threads whatever --threads is. Kernels ask for large pages when they
first see a weight (`headers/pages.h`); memory is kept from it here by MADV_NOHUGEPAGE, which is looked at,
then asked for. Weights past the last level of cache; the best of the repeats. Linux 6.1 or newer, and AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from cpu import PAST_CACHE, best, processor
from torch import Tensor

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp.build import know
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.formats import format

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


def reading() -> dict[str, float]:
    """Bytes a second of reading alone."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "read"
        text = Path(__file__).with_name("read_pages.cpp")
        told = ["g++", "-O3", "-march=x86-64-v3", "-std=c++17", str(text), "-o", str(program), "-lpthread"]
        subprocess.run(told, check=True)
        small, large = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return {"small": float(small), "large": float(large)}


def product(text: str, n: int, k: int, seconds: float) -> dict[str, Any]:
    """A row: bytes a second of one format's kernel in both kinds of page."""
    laid_out = cpu_layout(format(text), k)
    assert laid_out is not None, text
    spec = GemmSpec(laid_out, n, k, "f32")
    know([spec])
    x, q = torch.randn(1, k), laid_out.quantize(torch.randn(n, k) * 0.05)
    copies = [[part.clone() for part in q.parts] for _ in range(max(1, int(PAST_CACHE / 2 / q.nbytes)))]
    calls = [lambda p=p: torch.ops.bitfold.fused([x, *p], str(spec)) for p in copies]
    row: dict[str, Any] = {"format": text, "n": n, "k": k, "bytes": q.nbytes}
    for parts in copies:
        for part in parts:
            advise(part, NO_LARGE)
    tensors = [part for parts in copies for part in parts]
    for pages in ("small", "large"):
        row[pages] = q.nbytes / best(calls, seconds)
        row[f"bytes_in_large_pages_{pages}"] = in_large_pages(tensors)
        if pages == "small" and row["bytes_in_large_pages_small"]:
            raise SystemExit("memory that was to lie in small pages does not; nothing was measured")
        for parts in copies:
            for part in parts:
                advise(part, LARGE)
                advise(part, COLLAPSE)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape")
    parser.add_argument(
        "--formats", nargs="+", default=["int8", "int4[g128]", "int4[g64]", "int3[g128]", "mxfp4"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    n, k = map(int, given.shape.split("x"))
    with torch.inference_mode():
        big = torch.randn(1 << 26)
        advise(big, NO_LARGE)
        of_torch = big.nbytes / min(best([lambda: big.sum()], 1.0), best([lambda: big.amax()], 1.0))
        rows = [product(text, n, k, given.seconds) for text in given.formats]
    record: dict[str, Any] = {
        "machine": processor(),
        "torch": torch.__version__,
        "threads": given.threads,
        "read_by_torch": of_torch,
        "read": reading(),
        "rows": rows,
    }
    alone = record["read"]
    print(f"torch reads {of_torch / 1e9:.1f} GB/s", *(f"{name}: {alone[name] / 1e9:.1f}" for name in alone))
    for row in rows:
        small, large = row["small"], row["large"]
        said = f"{small / 1e9:.1f} GB/s, {small / of_torch:.1%} of torch's; large {large / 1e9:.1f}"
        print(f"{row['format']:12} {said}")
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
