"""Many rows of float x in tiles of AMX: x in digits, as one row of it is in `digits.py`, times signed bytes.

In: a `Body` whose weights are bytes before they are floats. Out: lines of C++, for compilers that have tiles.

    x of a block, 128 numbers   ->   24-bit integers and a power of two (`headers/tiled.h`), as three int8
    32 rows of codes times 16 rows of x in digits, summed in int32, exactly: 2**7 2**7 2**7 at most
    then  unit (d0 + 256 d1 + 65536 d2)  as floats, times the scale

A step of tiles is 1024 products a cycle, a third of that by three digits; floats are 32. bfloat16 x and
bytes, which bfloat16 holds exactly, would be 512 (`amx_bf16`), for x of that dtype alone. As for one row,
|error| <= 2**-23 (max |x|) (sum |w|) of each block besides what sums in float32 lose; x that has no such
digits goes the way of floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .body import Body
from .many_rows import each_weight, ends, opening, scales_of_panel
from .products import loads, registers, tail, units
from .values import decode

DEEP = 512  # bytes of a row that are decoded at a time
LARGEST = 128  # numbers to a block: x is rounded to its largest
LEAST = 32  # below, the end of a block costs more than its products
STEP = 64  # bytes of a tile's row


@dataclass(frozen=True)
class Tiled:
    """deep: codes that are decoded at a time; block: numbers of x that share a power of two; step: products
    of a step of tiles."""

    deep: int
    block: int
    step: int


def tiled(body: Body) -> Tiled | None:
    """How many rows of x are multiplied as digits, or None where they are as floats."""
    if body.by_integers or body.span is not None or not body.decode.floats.startswith("of_integers"):
        return None
    codes = body.walk.codes
    deep = codes * max(1, DEEP // codes)
    block = math.gcd(deep, LARGEST, body.cols or LARGEST)
    return Tiled(deep, block, math.gcd(block, codes, STEP)) if block >= LEAST else None


def many_digits(body: Body) -> list[str]:
    """`many_digits`, as `many` of `panels.py`; nothing where digits are not multiplied."""
    made = tiled(body)
    if made is None:
        return []
    at = "of + r * across + m - begin"
    use = [f"float* at = {at};"]
    if body.cols is None:
        use.append("storef(at, plus(p, loadf(at)));")
    else:
        use.append("Floats all = madd(p, same(scales_[r][k / kBlockOfMany]), loadf(at));")
        if body.needs_sums:
            sums = f"loadf(call.sum_panels + (k0 + k) / {body.sum_cols} * call.across + m)"
            use += [
                f"if ((k0 + k) % {body.sum_cols} == 0)",
                f"  all = madd({sums}, same(zeros_[r][k / kBlockOfMany]), all);",
            ]
        use.append("storef(at, all);")
    return [
        "#if defined(BITFOLD_TILES)",
        f"constexpr int kDeepBytes = {made.deep}, kBlockOfMany = {made.block};",
        *_bytes(body),
        "// `many`, of x in digits.",
        "inline void many_digits(",
        "    const Call& call, int64_t first, int64_t last, int64_t begin, int64_t end) {",
        *opening(body, "int8_t", "kTileRows", "kDeepBytes"),
        f"  Multiplier<true> tiles({made.step});",
        *each_weight(body),
        "      for (int64_t k0 = 0; k0 < call.k; k0 += kDeepBytes) {",
        "        const int64_t count_k = std::min<int64_t>(kDeepBytes, call.padded - k0);",
        "        for (int64_t r = 0; r < count; ++r)",
        "          stored_bytes(call, w, row + r, k0, k0 + count_k, kept + r * stride);",
        *(scales_of_panel(body, "kDeepBytes", "kBlockOfMany") if body.cols is not None else []),
        "        for (int64_t m = begin; m < end; m += kTileRows)",
        "          for (int64_t k = 0; k < count_k && k0 + k < call.k; k += kBlockOfMany)",
        f"            sums_of_digits<{made.step}>(",
        "                tiles, kept + k, stride,",
        "                call.digits + 3 * (m * call.padded + (k0 + k) * kTileRows),",
        f"                {'kBlockOfMany' if body.cols else 'std::min<int64_t>(kBlockOfMany, count_k - k)'},",
        "                call.steps + (k0 + k) / kBlockOfMany * call.across + m, [&](int r, Floats p) {",
        *(f"                  {line}" for line in use),
        "                });",
        "      }",
        *(_whole_rows() if body.cols is None else []),
        "    }",
        *ends(body, whole=False),
        "  }",
        "}",
        "#endif",
        "",
    ]


def _bytes(body: Body) -> list[str]:
    """Codes first .. last - 1 of a row as signed bytes, which floats are made of. A slice of 16 is stored
    with 16 bytes behind it, where the next one or nothing comes."""
    lines = [
        "inline void stored_bytes(",
        "    const Call& call, const Weight& w, int64_t row, int64_t first, int64_t last, int8_t* to) {",
        "  constexpr int R = 1, r = 0;",
        "  const int64_t stride = call.stride;",
        "  const uint8_t* const codes_of_row = w.codes + row * stride;",
        *tail(body),
        "  for (int64_t k = first, at = first / kCodes * kUnits; k < last; k += kCodes, at += kUnits) {",
        *units(body),
    ]
    for i in range(len(body.walk.slices)):
        step, places, takes = loads(body, i)
        place = f"reinterpret_cast<uint8_t*>(to + k - first + {i * body.walk.length} + v)"
        lines += [
            f"      for (int v = 0; v < kLength; v += {step}) {{",
            *(f"        {line}" for line in registers(step, places)),
            f"        store({place}, {decode(body.spec.weight.element, takes).bytes});",
            "      }",
        ]
    return [*lines, "  }", "}", ""]


def _whole_rows() -> list[str]:
    """One scale a row: it waits until the row is summed up."""
    return [
        "      for (int64_t r = 0; r < count; ++r) {",
        "        float s, z;",
        "        scales(w, scales_of(call, row + r), s, z);",
        "        for (int64_t m = 0; m < end - begin; ++m) of[r * across + m] *= s;",
        "      }",
    ]
