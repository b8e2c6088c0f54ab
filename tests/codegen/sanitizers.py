"""A plugin of pytest: C++ that is compiled in this process runs under the address and undefined sanitizers.

    LD_PRELOAD="libasan.so libstdc++.so" python -m pytest -p sanitizers test_conv_values.py

Kernels and operators alike: memory of tensors comes from an allocator that the sanitizer has replaced, and
vectors of the C++ library are watched up to their size, not to what they have room for. What is found ends
the process. `test_cpp_sanitized.py` starts such processes.
"""

from __future__ import annotations

import os

from bitfold.codegen.cpp.library import Library

FLAGS = (
    *(
        "-O1",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize=vptr",
    ),
    *("-fno-sanitize-recover=all", "-D_GLIBCXX_SANITIZE_VECTOR", "-D_GLIBCXX_ASSERTIONS"),
)

os.environ.pop("LD_PRELOAD", None)  # the compiler is not what is watched
_flags = Library.flags.fget
assert _flags is not None
Library.flags = property(lambda self: (*_flags(self), *FLAGS))  # type: ignore[assignment,method-assign]
