"""Products with many rows of x: rows of the weight are decoded once for all of them, multiplied in registers.

In: a `Body`. Out: lines of C++.

    for kStored rows of the weight:  for kDeep codes of each:
        decode them once (`stored`), then for all rows of x: `multiply` of headers/panels.h, or its `added` or
        `scaled_and_added` where they stay codes
    then bias, epilogue, store (`finish`)

Floats are decoded whole, scale and zero point included. Integers stay codes: their sums are exact over a
stretch that shares its scales, and scaled as in `products.py`. Where there are tiles of AMX, `added` and
`scaled_and_added` are theirs (headers/tiles.h), and floats are multiplied as digits (`tiles.py`).
"""

from __future__ import annotations

from ...formats import Integer
from ...formats.group_lanes import GROUPS
from .body import Body
from .digits import Digits, alone
from .ends import whole
from .many_rows import each_weight, ends, opening, scales_of_panel
from .products import each_float, loads, registers, tail, units
from .tiles import many_digits, tiled
from .values import raw
from .words import Words

_WHERE = "  const int64_t stride = call.stride; const uint8_t* const codes_of_row = w.codes + row * stride;"
# Codes that are decoded next lie elsewhere: further on in these rows, or at the beginning of later ones.
_NEXT = (
    "  const int64_t later = kStored * stride / kUnits * kCodes - first;",
    "  const int64_t next = (last < call.padded ? kDeep : later) / kCodes * kUnits;",
)
_AHEAD = ("      for (int b = 0; b < kUnits; b += kLine) ahead(u[0] + next + b);",)
DEEP = 256  # floats: sixteen rows of x take 16 KiB


def panels(body: Body) -> list[str]:
    """`stored`, `many`; nothing where x has a scale for each block of a row."""
    if body.token_cols is not None:
        return []
    deepest = "kDeepest" if body.by_integers else DEEP
    each = "kCodes" if body.span is None else "kSpan"
    shared = "kDeep" if body.cols is None else f"std::gcd(kDeep, {body.cols})"
    return [
        "// Codes of a row: decoded at a time, whose integer sums are scaled at once, of a step of tiles.",
        f"constexpr int kDeep = {each} * std::max(1, {deepest} / {each});",
        f"constexpr int kStretch = {shared}, kStep = std::gcd(64, std::gcd(kCodes, kStretch));",
        *(_depth(body) if body.by_integers else []),
        "",
        *(_codes(body) if body.by_integers else _numbers(body)),
        *many_digits(body),
        *_many(body),
    ]


def _depth(body: Body) -> list[str]:
    """How codes are multiplied; `many` goes over decoded rows by whole tiles of them."""
    return [
        f"using Codes = Deep<{body.spec.weight.element.bits}>;",
        "static_assert(kStored % Codes::tile == 0);",
    ]


def _numbers(body: Body) -> list[str]:
    """Codes first .. last - 1 of a row, a whole number of runs, as float32."""
    before, behind = body.apart()
    s, a, z = ("same(s)", "same(a)", "same(z)") if body.span is None else ("s", "a", "z")
    value = "f" if before == "0.0f" else f"plus(f, {a})"
    value = f"mul({value}, {s})" if behind == "0.0f" else f"plus(mul({value}, {s}), {z})"
    lines = [
        *whole(body),
        "inline void stored(",
        "    const Call& call, const Weight& w, int64_t row, int64_t first, int64_t last, float* to) {",
        "  constexpr int R = 1;",
        _WHERE,
        "  const int64_t base = scales_of(call, row);",
        *tail(body),
        *_NEXT,
        "  for (int64_t k = first, at = first / kCodes * kUnits; k < last; k += kCodes, at += kUnits) {",
        *units(body),
        *_AHEAD,
    ]
    for first, slices in body.stretches():
        lines += ["      {", *(_of_a_group(body, first) if body.span is None else _of_lanes())]
        for i in slices:
            place = f"to + k - first + {i * body.walk.length} + v + part * kFloats"
            lines += each_float(body, i, [f"storef({place}, {value});"])
        lines += ["      }"]
    return [*lines, "  }", "}", ""]


def _of_a_group(body: Body, first: int) -> list[str]:
    """What makes numbers of the stretch from code k + first on values."""
    return [
        "        float s, a, z;",
        f"        whole(w, base + ({body.group(first)}) * call.scale_group, s, a, z);",
    ]


def _of_lanes() -> list[str]:
    """The same where eight groups lie side by side, in vectors."""
    return [
        "        float each[3][kGroups];",
        "        for (int i = 0; i < kGroups; ++i) {",
        "          const int64_t group = std::min<int64_t>(k / kSpan * kGroups + i, call.groups - 1);",
        "          whole(w, base + group * call.scale_group, each[0][i], each[1][i], each[2][i]);",
        "        }",
        "        const Floats s = loadf(each[0]), a = loadf(each[1]), z = loadf(each[2]);",
    ]


def _codes(body: Body) -> list[str]:
    """The same as codes; many rows of integers are multiplied as such."""
    element = body.spec.weight.element
    assert isinstance(element, Integer)
    lines = [
        "inline void stored(",
        "    const Call& call, const Weight& w, int64_t row, int64_t first, int64_t last, Codes::Code* to) {",
        "  constexpr int R = 1, r = 0;",
        _WHERE,
        *tail(body),
        *_NEXT,
        "  for (int64_t k = first, at = first / kCodes * kUnits; k < last; k += kCodes, at += kUnits) {",
        *units(body),
        *_AHEAD,
    ]
    for i in range(len(body.walk.slices)):
        step, places, takes = loads(body, i)
        lines += [
            f"      for (int v = 0; v < kLength; v += {step}) {{",
            *(f"        {line}" for line in registers(step, places)),
            f"        {_put(body, f'{i * body.walk.length} + v', raw(element, takes))}",
            "      }",
        ]
    return [*lines, "  }", "}", ""]


def _put(body: Body, at: str, codes: str) -> str:
    """Codes k + at .. of a run, to where x has them: groups side by side, each to its own."""
    if body.span is None:
        return f"Codes::put(to + k - first + {at}, {codes});"
    return (
        f"put_apart(to + k / kSpan * kSpan - first + (k % kSpan + {at}) / kGroups, kSpan / kGroups, {codes});"
    )


def _many(body: Body) -> list[str]:
    number, stored, panel = (
        ("Codes::Number", "Codes::Code", "kIntPanel") if body.by_integers else ("float", "float", "kPanel")
    )
    step, half, tile = (
        ("2 * kHalf", "kHalf", "Codes::tile") if body.by_integers else ("kPanel", "kFloats", "kTile")
    )
    grouped = body.by_integers and not body.whole_rows
    return [
        "// Rows first .. last - 1 of the weight, times rows begin .. end - 1 of x, from a panel's first on.",
        "inline void many(const Call& call, int64_t first, int64_t last, int64_t begin, int64_t end) {",
        *(
            []
            if tiled(body) is None
            else [
                "#if defined(BITFOLD_TILES)",
                "  if (call.digits != nullptr) return many_digits(call, first, last, begin, end);",
                "#endif",
            ]
        ),
        *opening(body, stored, panel),
        *(["  Multiplier<false> tiles(kStep);"] if body.by_integers else []),
        *each_weight(body),
        "      for (int64_t k0 = 0; k0 < call.k; k0 += kDeep) {",
        "        const int64_t count_k = std::min<int64_t>(kDeep, call.padded - k0);",
        "        for (int64_t r = 0; r < count; ++r)",
        "          stored(call, w, row + r, k0, k0 + count_k, kept + r * stride);",
        *(scales_of_panel(body, "kDeep", "kStretch") if grouped else []),
        f"        for (int64_t m = begin; m < end; m += {step}) {{",
        f"          const auto* panels = static_cast<const {number}*>(call.panels);",
        f"          const auto* x = panels + m * call.padded + k0 * {panel};",
        *(_stretches(body) if grouped else []),
        f"          for (int64_t r0 = 0; r0 < count; r0 += {tile}) {{",
        f"            if (end - m > {half})",
        f"              {_multiplied(body, 2)}",
        "            else",
        f"              {_multiplied(body, 1)}",
        "          }",
        "        }",
        "      }",
        *(_exact(body) if body.by_integers and body.whole_rows else []),
        "    }",
        *ends(body, whole=not body.by_integers),
        "  }",
        "}",
        "",
    ]


def _multiplied(body: Body, vectors: int) -> str:
    rows, to = "kept + r0 * stride", "of + r0 * across + m - begin"
    if not body.by_integers:
        return f"multiply<{vectors}>({rows}, stride, x, count_k, {to}, across);"
    if body.whole_rows:
        return f"added<Codes, {vectors}, kStep>(tiles, {rows}, stride, x, next, count_k, {to}, across);"
    zeros = str(_by_zeros(body)).lower()
    return (
        f"scaled_and_added<Codes, {vectors}, kStep, kStretch, kDeep / kStretch, {zeros}>("
        f"tiles, {rows}, stride, x, next, of_m, r0, {to}, across);"
    )


def _by_zeros(body: Body) -> bool:
    """Whether what is added for x's sum differs from row to row; else it is integers, alike for all rows."""
    return body.scale is not None and body.scale.zero != "none"


def _stretches(body: Body) -> list[str]:
    """What stretches of some rows of x begin with: codes are `base` too high, times x's sum, where a stretch
    has one; or those sums, for the zeros of each row."""
    at = f"(k0 + k) / {body.sum_cols} * call.across + m"
    use = [
        "              for (int i = 0; i < std::min<int64_t>(2 * kHalf, call.across - m); ++i)",
        f"                starts[k / kStretch][i] = -{body.base} * static_cast<int32_t>(",
        f"                    call.sum_panels[{at} + i]);",
    ]
    if _by_zeros(body):
        use = [f"              x_sums[k / kStretch] = call.sum_panels + {at};"]
    first = [f"            if ((k0 + k) % {body.sum_cols} == 0)", *use]
    return [
        "          alignas(64) int32_t starts[kDeep / kStretch][2 * kHalf] = {};",
        "          const float* x_sums[kDeep / kStretch] = {};",
        "          int64_t stretches = 0;",
        "          for (int64_t k = 0; k < count_k && k0 + k < call.k; k += kStretch, ++stretches)",
        *(first if body.needs_sums else ["            ;"]),
        "          const Stretches of_m = {stretches, starts[0], scales_[0], zeros_[0], x_sums};",
    ]


def _exact(body: Body) -> list[str]:
    """Sums of integers over whole rows become floats."""
    return [
        "      for (int64_t r = 0; r < count; ++r) {",
        "        float s, z;",
        "        scales(w, scales_of(call, row + r), s, z);",
        "        float* const at = of + r * across;",
        "        for (int64_t m = 0; m < end - begin; m += kInts)",
        "          store_sums(at + m, scaled(numbers(at + m), s, no_sums()));",
        "      }",
    ]


def entry(body: Body) -> list[str]:
    """The functions that the runtime calls."""
    bits = body.spec.weight.element.bits if body.by_integers else 0
    made = alone(body)
    words = str(isinstance(made, Words)).lower()
    in_digits = "0, 0, false" if made is None else f"{made.block}, {made.base}, {words}"
    many = tiled(body)
    of_many = "0, 0" if many is None else f"{many.block}, {many.step}"
    side_by_side = "0, 0"
    if body.span is not None:
        joined = made.joined // GROUPS if isinstance(made, Digits) else 0
        side_by_side = f"{body.cols}, {joined}"
    kind = f"{str(body.held).lower()}, {bits}, {in_digits}, {of_many}, {side_by_side}"
    wants = (f'extern "C" const bitfold::Wants* wants() {{ return bitfold::wants<{kind}>(); }}',)
    if body.token_cols is not None:
        return [*wants]
    return [
        *wants,
        'extern "C" void many(const bitfold::Call* call, int64_t first, int64_t last,',
        "                     int64_t begin, int64_t end) {",
        "  bitfold::many(*call, first, last, begin, end);",
        "}",
    ]
