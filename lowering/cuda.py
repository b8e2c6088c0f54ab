"""The CUDA target of Inductor: weights decoded inside the kernels that Triton makes of the graph.

In: a region of dequantize and matmul. Out: the same region; Inductor puts the decoding into the loop of a
matrix vector product, and in front of a larger matmul. Generated dequant-GEMM kernels are another target's.

    dequantize -> linear   stays   dequantize -> linear, compiled by Inductor
"""

from __future__ import annotations

from typing import ClassVar

from .inductor import InductorTarget


class CudaTarget(InductorTarget):
    """One CUDA device."""

    name: ClassVar[str] = "cuda"
    device: ClassVar[str] = "cuda"
