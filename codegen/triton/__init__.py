"""Triton source of fused kernels, and what launches them. Triton itself is imported inside functions only."""

from .source import arguments_needed, source

__all__ = ["arguments_needed", "source"]
