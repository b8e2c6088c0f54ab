"""From a `ConvSpec` to the C++ source of its kernel: what is done to sixteen sums of a pixel (`conv_end.py`),
and fixed loops around it.

In: a `ConvSpec`. Out: the text of a file with one `run(call, first pixel, last, first panel, last)`. The
loops are those of `headers/conv.h`; sizes, strides and addresses are in the call, so that layers that
differ in nothing else share one kernel.

    conv 64x32x3x3 p1x1 .. -> relu(add(y0,e0)) e:f32 y:int8[tensor]
    ->  struct End { .. };   run(..) { gemm<false, End>(..); }
"""

from __future__ import annotations

from ..conv import ConvSpec, has_zero
from .conv_end import end

_INCLUDES = ("<algorithm>", "<cmath>", "<cstdint>", "<cstring>", '"conv.h"')


def source(spec: ConvSpec) -> str:
    """The kernel's file as text."""
    positive = "true" if spec.positive else "false"
    of_x = "1" if spec.depthwise else f"bitfold::kBytes<{positive}>"
    zero = "true" if has_zero(spec.activation) else "false"
    loops = f"depthwise<{positive}, {zero}, End>(*call, first, last, from, to);"
    if not spec.depthwise:
        loops = f"gemm<{positive}, End>(*call, first, last, from, to);"
    lines = [
        *(f"#include {name}" for name in _INCLUDES),
        "",
        "namespace bitfold {",
        "namespace {",
        "",
        *end(spec),
        "}  // namespace",
        "}  // namespace bitfold",
        "",
        'extern "C" void run(const bitfold::Conv* call, int64_t first, int64_t last,',
        "                    int64_t from, int64_t to) {",
        "  using namespace bitfold;",
        f"  {loops}",
        "}",
        f'extern "C" int bytes() {{ return {of_x}; }}',
        'extern "C" void widen(const bitfold::Conv* call, int16_t* to) { bitfold::widen(*call, to); }',
    ]
    return "\n".join(lines) + "\n"
