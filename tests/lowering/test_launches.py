"""That Inductor's kernels wait for their predecessors, those too that load nothing; without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer

from bitfold.lowering.cuda.launches import can_overlap, every_kernel_waits

WAIT, LAUNCH = TritonKernel.GDC_WAIT, TritonKernel.GDC_LAUNCH


class Printed:
    """What `_filter_pdl` reads of a kernel."""

    GDC_WAIT, GDC_LAUNCH = WAIT, LAUNCH

    def __init__(self, overlaps: bool) -> None:
        self.overlaps = overlaps

    def _enable_pdl_codegen(self) -> bool:
        return self.overlaps


def printed(lines: list[str], overlaps: bool = True) -> list[Any]:
    code = IndentedBuffer()
    code.writelines(lines)
    TritonKernel._filter_pdl(Printed(overlaps), code)  # type: ignore[arg-type]
    return list(code._lines)


FILL = ["tmp0 = 0.0", "tl.store(out_ptr0 + x0, tmp0, xmask)"]
COPY = [WAIT, "tmp0 = tl.load(in_ptr0 + x0, xmask)", WAIT, LAUNCH, "tl.store(out_ptr0 + x0, tmp0, xmask)"]


def test_this_torch_can_be_completed() -> None:
    """Or the CUDA target would leave launches ordinary without anybody's notice."""
    assert can_overlap()


def test_a_kernel_that_loads_nothing_waits() -> None:
    assert printed(FILL) == FILL
    with every_kernel_waits():
        assert printed(FILL) == [WAIT, *FILL]
        assert printed(FILL, overlaps=False) == FILL
    assert printed(FILL) == FILL


def test_a_kernel_that_waits_is_left_as_it_is() -> None:
    plain = printed(COPY)
    with every_kernel_waits():
        assert printed(COPY) == plain
    assert plain.count(WAIT) == 1


def test_it_ends_with_an_error_too() -> None:
    before = TritonKernel._filter_pdl
    with pytest.raises(ZeroDivisionError), every_kernel_waits():
        raise ZeroDivisionError
    assert TritonKernel._filter_pdl is before


def test_a_torch_that_prints_them_otherwise_keeps_ordinary_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TritonKernel, "_filter_pdl")
    assert not can_overlap()
