"""From a spec to the C++ source of its kernel: products with a few rows of x, and with many.

In: a `GemmSpec`. Out: the text of a file with one `run(call, first, last)`, for rows first .. last - 1 of the
weight; what varies from call to call (n, k, the number of rows of x, addresses) is in the call, so that all
layers of a format in one layout share one kernel. Nothing in it names a format.

    linear 1536x576 f32 int4[g64,planar]
    ->  for each run of 64 codes: two slices of 32 nibbles -> floats, times x, added up; times the scale

Rows of the weight are taken a few at a time and rows of x up to four; a vector of sums for each pair is added
up over the row, and only then across its numbers. With activations in int8 the sums of a group are int32.
Many rows of x are multiplied by decoded rows of the weight (`panels.py`).
"""

from __future__ import annotations

from ..spec import GemmSpec
from .body import Body
from .digits import alone, by_digits
from .ends import finish, scales
from .panels import entry, panels
from .products import CHUNK, tile

# Rows of the weight taken together with 1, 2 and 4 rows of x. One at a time is one stream of memory, which a
# processor foresees; several were slower on an EPYC. With four rows of x the multipliers are the bound.
ROWS = {1: 1, 2: 1, 4: 2}


def kind(spec: GemmSpec) -> str:
    """The spec's text without its sizes, which most layouts' kernels do not depend on."""
    first, size, *rest = str(spec).split(" ", 2)
    assert size == f"{spec.n}x{spec.k}"
    return " ".join([first, *rest])


def source(spec: GemmSpec) -> str:
    """The kernel's file as text."""
    body = Body(spec)
    w = body.walk
    lines = [
        f"// {kind(spec)}",
        "#include <algorithm>",
        "#include <numeric>",
        '#include "kernel.h"',
        "#include VECTORS",
        '#include "numbers.h"',
        '#include "panels.h"',
        "",
        "namespace bitfold {",
        "namespace {",
        "",
        f"constexpr int kCodes = {w.codes}, kUnits = {w.units}, kLength = {w.length};",
        f"constexpr int kParts = {min(CHUNK, w.length)} / kFloats;  // vectors of floats in one of bytes",
        *(
            []
            if body.cols is None
            else [f"constexpr int kBlock = {body.block}, kScales = kBlock / {body.cols};"]
        ),
        *([] if body.span is None else _span(body.span)),
        "constexpr int kRead = 8;  // scales that are turned into float32 together",
        *([body.decode.table] if body.decode.table and not body.by_integers else []),
        "template <class T> inline float rounded(float v) {",
        "  float r[1];",
        "  T::put(r, 0, v);",
        "  return T::get(r, 0);",
        "}",
        "",
        *scales(body),
        *tile(body),
        *finish(body),
        *by_digits(body),
        *panels(body),
        *rows(body),
        "}  // namespace",
        "}  // namespace bitfold",
        "",
        'extern "C" void run(const bitfold::Call* call, int64_t first, int64_t last) {',
        "  bitfold::rows(*call, first, last);",
        "}",
        *entry(body),
    ]
    return "\n".join(lines) + "\n"


def _span(span: int) -> list[str]:
    """Codes of eight groups; what makes x ready has memory for so many (`side_by_side`, headers/ready.h)."""
    return [
        f"constexpr int kSpan = {span};  // codes of eight groups",
        "static_assert(kSpan <= kGroups * kLongest);",
    ]


def rows(body: Body) -> list[str]:
    """How the rows of a call are cut into tiles."""
    many = body.spec.weights
    eight = 2 if body.whole_rows else 1  # groups have sums of their own besides, as many again
    integers = "  if (call.digits != nullptr) return by_digits<R>(call, row);"
    return [
        "// Rows row .. row + R - 1, `most` of them at a time; their ends together, in vectors.",
        "template <int most, int M, int R>",
        "inline void each_row(const Call& call, int64_t row, int64_t m0) {",
        "  constexpr int step = most < R ? most : R;",
        f"  float sums[{many}][R][M];",
        f"  for (int w = 0; w < {many}; ++w)",
        "    for (int r = 0; r < R; r += step)",
        "      tile<step, M>(call, call.weights[w], row + r, m0, sums[w] + r);",
        "  finish<R, M>(call, row, m0, sums);",
        "}",
        "",
        "template <int R>",
        "inline void few(const Call& call, int64_t row) {",
        *([] if alone(body) is None else [integers]),
        "  int64_t m = 0;",
        "  if constexpr (kMostOfX > 4)",
        f"    for (; m + kMostOfX <= call.m; m += kMostOfX) each_row<{eight}, kMostOfX, R>(call, row, m);",
        f"  for (; m + 4 <= call.m; m += 4) each_row<{ROWS[4]}, 4, R>(call, row, m);",
        f"  for (; m + 2 <= call.m; m += 2) each_row<{ROWS[2]}, 2, R>(call, row, m);",
        f"  for (; m < call.m; ++m) each_row<{ROWS[1]}, 1, R>(call, row, m);",
        "}",
        "",
        "// Four rows at a time: their codes are in the cache for the next rows of x.",
        "inline void rows(const Call& call, int64_t first, int64_t last) {",
        "  int64_t row = first;",
        "  for (; row + 4 <= last; row += 4) few<4>(call, row);",
        "  for (; row < last; ++row) few<1>(call, row);",
        "}",
        "",
    ]
