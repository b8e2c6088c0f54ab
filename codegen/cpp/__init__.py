"""C++ source of fused kernels for CPUs, and what builds and runs them."""

from .source import Body, source

__all__ = ["Body", "source"]
