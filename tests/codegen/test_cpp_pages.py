"""Weights lie in pages of 2 MiB once they were read, and hold what they held.

8 MiB of codes in pages of 4 KiB, one call   ->   AnonHugePages of their mapping is no longer 0
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from bitfold.codegen import GemmSpec
from bitfold.codegen.cpp import build
from bitfold.codegen.cpp.support import cpu_layout
from bitfold.formats import format

PAGE = 2 << 20
COLLAPSE = 25  # MADV_COLLAPSE


def madvise(address: int, size: int, advice: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return int(libc.madvise(address, size, advice))


def told_of(address: int, what: str) -> str:
    """What Linux says of the mapping at `address`."""
    within = False
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if "-" in first and not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                within = start <= address < end
            elif within and first == what:
                return rest
    return ""


def in_large_pages(address: int) -> int:
    """Bytes of the mapping at `address` that lie in large pages."""
    return int(told_of(address, "AnonHugePages:").split()[0]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MiB are asked of Linux")
def test_a_weight_is_gathered_once_it_is_read() -> None:
    held = mmap.mmap(-1, 10 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    madvise(start, len(held), 15)  # MADV_NOHUGEPAGE, so that memory comes in small pages
    f = cpu_layout(format("int8"), 4096)
    assert f is not None
    spec = GemmSpec(f, 2048, 4096, "f32")
    q = f.quantize(torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0)))
    codes = torch.frombuffer(held, dtype=torch.uint8, count=q.parts[0].numel()).view_as(q.parts[0])
    codes.copy_(q.parts[0].view(torch.uint8))
    madvise(start, len(held), 14)  # MADV_HUGEPAGE: allowed again, but nothing moves by itself soon
    inside = -(-start // PAGE) * PAGE
    build.know([spec])
    probe = mmap.mmap(-1, 3 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    probed = ctypes.addressof(ctypes.c_char.from_buffer(probe))
    probe.write(b"x" * len(probe))
    if madvise(-(-probed // PAGE) * PAGE, PAGE, COLLAPSE) != 0:
        pytest.skip("this Linux gathers no pages when it is asked")
    x, before = torch.randn(1, 4096, generator=torch.Generator().manual_seed(1)), codes.clone()
    (want,) = torch.ops.bitfold.fused([x, before, *q.parts[1:]], str(spec))
    (y,) = torch.ops.bitfold.fused([x, codes, *q.parts[1:]], str(spec))
    assert torch.equal(y, want) and torch.equal(codes, before)
    assert in_large_pages(inside) >= 3 * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MiB are asked of Linux")
def test_memory_that_is_to_stay_in_small_pages_does() -> None:
    """Whoever said so, an allocator or a user, is not told otherwise."""
    held = mmap.mmap(-1, 14 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    madvise(start, len(held), 15)  # MADV_NOHUGEPAGE
    if "nh" not in told_of(start, "VmFlags:"):
        pytest.skip("this Linux has no large pages")
    f = cpu_layout(format("int8"), 4096)
    assert f is not None
    spec = GemmSpec(f, 3072, 4096, "f32")
    q = f.quantize(torch.randn(3072, 4096))
    codes = torch.frombuffer(held, dtype=torch.uint8, count=q.parts[0].numel()).view_as(q.parts[0])
    codes.copy_(q.parts[0].view(torch.uint8))
    build.know([spec])
    torch.ops.bitfold.fused([torch.randn(1, 4096), codes, *q.parts[1:]], str(spec))
    inside = -(-start // PAGE) * PAGE + PAGE
    flags = told_of(inside, "VmFlags:").split()
    assert "nh" in flags and "hg" not in flags and in_large_pages(inside) == 0
