"""What a number on a GPU is worth nothing without: its card and versions, and what the card can do at most.

In: the GPU. Out: names and versions; bytes and flops a second. `bitfold.codegen.timing` times calls.

    card()   ->   {"card": "NVIDIA H200", "torch": "2.11.0+cu130", ...}
    roof()   ->   {"read": 4.45e12, "bf16": 7.9e14, ...}
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from bitfold.codegen.timing import copies_past_cache, microseconds

__all__ = ["card", "copies_past_cache", "microseconds", "read_bandwidth", "roof"]


def card() -> dict[str, str]:
    """Names and versions that a number is worth nothing without."""
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "driver": _driver(),
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return printed.splitlines()[0]


def read_bandwidth() -> float:
    """Bytes a second of a reduction over 4 GiB; the better of two, which one differs between versions."""
    big = torch.randn(1 << 15, 1 << 15, device="cuda")
    reductions: list[Callable[[], Any]] = [lambda: torch.amax(big, 1), lambda: big.view(torch.int32).sum()]
    return max(big.nbytes / microseconds([one], 9) for one in reductions) * 1e6


def roof(side: int = 8192) -> dict[str, float]:
    """What the card reads in bytes a second, and flops a second of square products in three types."""
    read = read_bandwidth()
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ai, bi = (torch.randint(-127, 128, (side, side), device="cuda", dtype=torch.int8) for _ in range(2))
    one = torch.ones((), device="cuda")
    products: dict[str, Callable[[], Any]] = {
        "bf16": lambda: a @ b.t(),
        "fp8": lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        "int8": lambda: torch._int_mm(ai, bi.t()),
    }
    flops = {name: 2 * side**3 / microseconds([call], 9) * 1e6 for name, call in products.items()}
    return {"read": read, **flops}
