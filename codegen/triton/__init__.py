"""Triton source of fused kernels, and what launches them. Triton itself is imported inside functions only."""

from .source import source

__all__ = ["source"]
