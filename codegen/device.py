"""What a GPU can do: the few facts that a schedule's cost rests on.

In: a card's name, or the properties that torch reports. Out: a `Device`.

    device("NVIDIA H200")   ->   Device(name="NVIDIA H200", arch=90, multiprocessors=132, read=4.46e12, ...)

Known cards by NVIDIA's data sheets, others by what the driver says. Both are peaks: 93 % of the bandwidth
(one H200, one H100) and 79 % of the dense rate (one H200) were measured, and are taken for every card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

READ = 0.93
DENSE = 0.79
# The card that stands in where there is none: the one that the schedules were measured on.
DEFAULT = "NVIDIA H200"


@dataclass(frozen=True)
class Device:
    """name: as torch reports it; arch: compute capability, 90 for 9.0; read: bytes a second that a kernel
    reads at best; flops: a second, of bfloat16 products summed in float32; shared: bytes of shared memory of
    a multiprocessor; clock: cycles a second under load."""

    name: str
    arch: int
    multiprocessors: int
    read: float
    flops: float
    shared: int
    clock: float

    @property
    def shared_of_program(self) -> int:
        """Bytes that one program may have: a multiprocessor keeps one KiB of its own."""
        return self.shared - 1024

    @property
    def slug(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


# name, arch, multiprocessors, TB/s, dense bf16 TFLOP/s, KiB of shared memory, GHz: data sheets and the CUDA
# C++ Programming Guide's table of compute capabilities. The first whose name begins a card's is taken.
_CARDS = (
    ("NVIDIA A100-SXM4-40GB", 80, 108, 1.555, 312, 164, 1.41),
    ("NVIDIA A100-PCIE-40GB", 80, 108, 1.555, 312, 164, 1.41),
    ("NVIDIA A100 80GB PCIe", 80, 108, 1.935, 312, 164, 1.41),
    ("NVIDIA A100", 80, 108, 2.039, 312, 164, 1.41),
    ("NVIDIA L40S", 89, 142, 0.864, 362, 100, 2.52),
    ("NVIDIA L4", 89, 58, 0.300, 121, 100, 2.04),
    ("NVIDIA GeForce RTX 4090", 89, 128, 1.008, 165, 100, 2.52),
    ("NVIDIA GeForce RTX 3090", 86, 82, 0.936, 71, 100, 1.70),
    ("NVIDIA H100 PCIe", 90, 114, 2.0, 756, 228, 1.62),
    ("NVIDIA H100 NVL", 90, 132, 3.9, 835, 228, 1.75),
    ("NVIDIA H100", 90, 132, 3.35, 989, 228, 1.75),
    ("NVIDIA GH200", 90, 132, 4.0, 989, 228, 1.75),
    ("NVIDIA H200", 90, 132, 4.8, 989, 228, 1.75),
    ("NVIDIA B200", 100, 148, 8.0, 2250, 228, 1.85),
    ("NVIDIA GB200", 100, 148, 8.0, 2500, 228, 1.85),
)
# Flops of dense bf16 products a multiprocessor and cycle, by compute capability.
_FLOPS = {75: 1024, 80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 103: 8192, 120: 1024}


@lru_cache(maxsize=64)
def device(name: str) -> Device:
    """A known card. KeyError if its data are not at hand."""
    for start, arch, count, read, flops, shared, clock in _CARDS:
        if name.startswith(start):
            return Device(
                name, arch, count, read * 1e12 * READ, flops * 1e12 * DENSE, shared << 10, clock * 1e9
            )
    raise KeyError(name)


def from_properties(found: Any) -> Device:
    """A card by what `torch.cuda.get_device_properties` says of it; rates are clock times width."""
    try:
        return device(found.name)
    except KeyError:
        pass
    arch = 10 * found.major + found.minor
    clock = found.clock_rate * 1e3
    # Two transfers a memory clock; the width is in bits, the rates are in kHz.
    read = 2 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8
    per_cycle = _FLOPS.get(arch, 2048 if arch >= 80 else 1024)
    return Device(
        found.name,
        arch,
        found.multi_processor_count,
        read * READ,
        found.multi_processor_count * clock * per_cycle * DENSE,
        found.shared_memory_per_multiprocessor,
        clock,
    )


def present() -> Device:
    """The current CUDA device; the card that schedules were measured on where there is none."""
    if not torch.cuda.is_available():
        return device(DEFAULT)
    return from_properties(torch.cuda.get_device_properties(torch.cuda.current_device()))
