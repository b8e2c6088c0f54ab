"""Faults that a sanitizer must stop; `test_cpp_sanitized.py` runs each in a process of its own."""

from __future__ import annotations

import ctypes

import pytest
import torch

from bitfold.codegen.cpp.library import Library
from bitfold.codegen.cpp.vectors import VECTORS

FAULTS = {
    "behind": "return at[size];",
    "before": "return at[-1];",
    "vector": "std::vector<int> v(8); v.resize(size / 16); return v.data()[size / 16];",
    "shift": "return 1 << int(size);",
    "overflow": "return 2147483647 + int(size);",
    "alignment": "return *reinterpret_cast<const int*>(at + 1);",
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    head = '#include <cstdint>\n#include <vector>\nextern "C" int run(const int8_t* at, int64_t size) {'
    found = Library(f"{head} {FAULTS[name]} }}\n", VECTORS["portable"]).loaded(ctypes.CDLL)
    x = torch.zeros(64, dtype=torch.int8)
    found.run(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(64))
