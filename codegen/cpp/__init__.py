"""C++ source of fused kernels for CPUs, and what builds and runs them."""

from .body import Body
from .source import source

__all__ = ["Body", "source"]
