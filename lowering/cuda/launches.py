"""Launches of Inductor's kernels that overlap, where torch leaves one case out.

In: nothing. Out: a context in which each Triton kernel that Inductor prints waits for its predecessor.

    with every_kernel_waits():
        compile_fx(gm, inputs, config_patches={"triton.enable_pdl": True})

A kernel that starts early and ends must have waited for the one before it, or its own end says nothing of
that one's: the third kernel, which waits for the second, would read what the first has not written. Inductor
lets kernels wait where they load, and a kernel that loads nothing (zeros, a range) would not wait at all.
CUDA C++ Programming Guide, Programmatic Dependent Launch; PTX ISA, griddepcontrol.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from ...formats import cache_tag

_PATCHING = RLock()
# Torch's compile caches keep what was printed.
cache_tag.add("waits 1")


def can_overlap() -> bool:
    """Whether this torch prints overlapping launches, and in the way that `every_kernel_waits` completes."""
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonKernel

    known = ("_filter_pdl", "_enable_pdl_codegen", "GDC_WAIT")
    return hasattr(config.triton, "enable_pdl") and all(hasattr(TritonKernel, name) for name in known)


@contextmanager
def every_kernel_waits() -> Iterator[None]:
    """Inductor has no hook for it: the last step of its printing is wrapped, and put back. Elsewhere, a
    kernel that is printed meanwhile gets nothing but the wait that it lacks."""
    from torch._inductor.codegen.triton import TritonKernel

    with _PATCHING:
        plain: Any = TritonKernel._filter_pdl

        def filtered(self: Any, code: Any) -> None:
            plain(self, code)
            waits = any(isinstance(line, str) and self.GDC_WAIT in line for line in code._lines)
            if self._enable_pdl_codegen() and not waits:
                code._lines.insert(0, self.GDC_WAIT)

        TritonKernel._filter_pdl = filtered  # type: ignore[method-assign]
        try:
            yield
        finally:
            TritonKernel._filter_pdl = plain  # type: ignore[method-assign]
