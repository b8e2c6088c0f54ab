"""What kernels with many rows of x have in common: the loops around products, scales, and the ends of sums.

In: a `Body`. Out: lines of C++ for `panels.py` and `tiles.py`.

    for kStored rows of the weight:  for each weight:  [the caller's products, onto `of`]
    then bias, epilogue, store (`finish`)
"""

from __future__ import annotations

from .body import Body


def opening(body: Body, stored: str, panel: str, deep: str = "kDeep") -> list[str]:
    """Of a function for many rows of x: memory for decoded rows of the weight, `kept`, and for sums, each row
    of them an odd number of the cache's lines."""
    return [
        f"  constexpr int64_t stride = {deep} + kApart;",
        f"  Lines<{stored}> decoded(kStored * stride);",
        f"  {stored}* const kept = decoded.begin();",
        f"  const int64_t panels_ = (end - begin + {panel} - 1) / {panel};",
        f"  const int64_t across = panels_ * {panel} + 16;",
        f"  Lines<float> numbers_({body.spec.weights} * kStored * across);",
        "  float* const sums = numbers_.begin();",
        "  [[maybe_unused]] const int64_t next = call.padded * kIntPanel;",
    ]


def each_weight(body: Body) -> list[str]:
    """Two loops, whose ends are the caller's: over rows of the weight, and over weights."""
    many = body.spec.weights
    return [
        "  for (int64_t row = first; row < last; row += kStored) {",
        "    const int64_t count = std::min<int64_t>(kStored, last - row);",
        f"    std::fill_n(sums, {many} * kStored * across, 0.0f);",
        f"    for (int i = 0; i < {many}; ++i) {{",
        "      const Weight& w = call.weights[i];",
        "      float* const of = sums + i * kStored * across;",
    ]


def scales_of_panel(body: Body, deep: str, shared: str) -> list[str]:
    """Scales of the codes that are decoded, and what is added for each unit of x's sum."""
    place = f"scales_of(call, row + r) + (k0 + k) / {body.cols} * call.scale_group"
    both = f"scales_[r][k / {shared}], zeros_[r][k / {shared}]"
    return [
        f"        float scales_[kStored][{deep} / {shared}] = {{}};",
        f"        float zeros_[kStored][{deep} / {shared}] = {{}};",
        "        for (int64_t r = 0; r < count; ++r)",
        f"          for (int64_t k = 0; k < count_k && k0 + k < call.k; k += {shared})",
        f"            scales(w, {place}, {both});",
    ]


def ends(body: Body, *, whole: bool) -> list[str]:
    """What becomes of the sums of kStored rows of the weight; whole: they are of complete values."""
    many, complete = body.spec.weights, str(whole).lower()
    return [
        "    for (int64_t m0 = begin; m0 < end; m0 += kEnds) {",
        f"      alignas(64) float all[kEnds][{many}][kStored][1];",
        f"      taken_out<{many}>(sums + m0 - begin, across, all);",
        "      for (int64_t m = m0; m < std::min<int64_t>(end, m0 + kEnds); ++m) {",
        "        const auto& of_m = all[m - m0];",
        "        for (int64_t r = 0; r < count && count < kStored; ++r) {",
        f"          float one[{many}][1][1];",
        f"          for (int i = 0; i < {many}; ++i) one[i][0][0] = of_m[i][r][0];",
        f"          finish<1, 1, {complete}>(call, row + r, m, one);",
        "        }",
        f"        if (count == kStored) finish<kStored, 1, {complete}>(call, row, m, all[m - m0]);",
        "      }",
        "    }",
    ]
