"""Kernel specification and schedule to source: fused dequant-GEMM kernels, generated from formats.

In: a `GemmSpec` (what is computed) and a `Schedule` (how). Out: Triton source, compiled and launched.

    spec = GemmSpec(format("int4[g128,halves256]"), n=4096, k=4096)
    triton.source(spec, Schedule(block_m=16, block_n=64, scale="sum"))

Decoding comes from the element (`decode.py`), walking over a row from the layout (`slices.py`); no format is
named in this folder. Passes are unknown here.
"""

from .choose import choose
from .layouts import kernel_layout, runs_on_kernels
from .schedule import Schedule, scales
from .slices import Walk, walk
from .spec import CodegenError, GemmSpec, Inputs

__all__ = [
    "CodegenError",
    "GemmSpec",
    "Inputs",
    "Schedule",
    "Walk",
    "choose",
    "kernel_layout",
    "runs_on_kernels",
    "scales",
    "walk",
]
