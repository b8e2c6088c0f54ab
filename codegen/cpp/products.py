"""Sums of products for a few rows of the weight and of x: the loop that a CPU kernel's time goes into.

In: a `Body`. Out: lines of C++.

    for each run:  for each stretch of codes with scales of their own:
        codes -> floats, times x, added up (or codes times int8, in int32);  the sum, scaled, to the row's sum
"""

from __future__ import annotations

from collections.abc import Sequence

from ...formats import Integer
from ..slices import Take, renumbered
from .body import Body
from .values import decode, raw

CHUNK = 32  # bytes of a vector


def tile(body: Body) -> list[str]:
    """The function of that name: R rows of the weight times M rows of x."""
    sums, none = ("Ints", "no_ints") if body.by_integers else ("Floats", "zeros")
    element = "int8_t" if body.by_integers else "float"
    fresh = [
        f"{sums} p[R][M];",
        "for (int r = 0; r < R; ++r)",
        f"  for (int m = 0; m < M; ++m) p[r][m] = {none}();",
    ]
    head = [
        "// out[r][m]: rows row .. row + R - 1 of the weight times rows m0 .. m0 + M - 1 of x.",
        "template <int R, int M>",
        "inline void tile(",
        "    const Call& call, const Weight& w, int64_t row, int64_t m0, float (&out)[R][M]) {",
        "  Floats total[R][M];",
        "  float rest[R][M];",
        "  for (int r = 0; r < R; ++r)",
        "    for (int m = 0; m < M; ++m) total[r][m] = zeros(), rest[r][m] = 0.0f;",
        *(f"  {line}" for line in fresh if body.whole_rows),
        "  int64_t base[R];",
        "  for (int r = 0; r < R; ++r) base[r] = scales_of(call, row + r);",
    ]
    loop = [
        "  for (int64_t k = 0, at = 0; k < call.k; k += kCodes, at += kUnits) {",
        *units(body),
        f"    const {element}* x = static_cast<const {element}*>(call.x) + m0 * call.padded + k;",
    ]
    for first, slices in body.stretches():
        loop += ["    {", *(f"      {line}" for line in fresh if not body.whole_rows)]
        for i in slices:
            loop += _of_integers(body, i) if body.by_integers else _of_floats(body, i)
        loop += [*([] if body.whole_rows else _close(body, first)), "    }"]
    # One scale a row: it waits until the row is summed up.
    tail = ["  {", "    const int64_t k = 0;", *_close(body, 0), "  }"] if body.whole_rows else []
    return [
        *head,
        *loop,
        "  }",
        *tail,
        "  for (int r = 0; r < R; ++r)",
        "    for (int m = 0; m < M; ++m) out[r][m] = sum(total[r][m]) + rest[r][m];",
        "}",
        "",
    ]


def units(body: Body) -> list[str]:
    """Where the units of this run are, for each row."""
    lines = [
        "    const uint8_t* u[R];",
        "    for (int r = 0; r < R; ++r) u[r] = w.codes + (row + r) * call.stride + at;",
    ]
    if not body.cut_short:
        return lines
    return [
        *lines,
        "    uint8_t last[R][kUnits + 32];",
        "    if (k + kCodes > call.k)  // what follows is the next row, or no memory",
        "      for (int r = 0; r < R; ++r) {",
        "        std::memset(last[r], 0, sizeof last[r]);",
        "        std::memcpy(last[r], u[r], call.k - k);",
        "        u[r] = last[r];",
        "      }",
    ]


def each_float(body: Body, i: int, use: Sequence[str]) -> list[str]:
    """Slice i of R rows as vectors of floats: `use` has each, `f`, of row r, whose first number is number
    `v + part * kFloats` of the slice."""
    step, places, takes = _loads(body, i)
    made = decode(body.spec.weight.element, takes)
    codes = [f"const uint8_t* codes = {places[0]};"]  # as they lie: widening reads memory
    if made.bytes != "b0":
        codes = [*_registers(step, places), "alignas(32) uint8_t codes[32];", f"store(codes, {made.bytes});"]
    return [
        f"      for (int v = 0; v < kLength; v += {step})",
        "        for (int r = 0; r < R; ++r) {",
        *(f"          {line}" for line in codes),
        f"          unrolled<{step} / kFloats>([&](auto part_) {{",
        "            constexpr int part = decltype(part_)::value;",
        f"            const Floats f = {made.floats};",
        *(f"            {line}" for line in use),
        "          });",
        "        }",
    ]


def _loads(body: Body, i: int) -> tuple[int, list[str], list[Take]]:
    """(bytes of a step, where the bytes of each load of slice i are, how its codes are taken out of them)"""
    ((takes,), loads) = renumbered(body.walk.slices[i : i + 1])
    places = [f"u[r] + {body.walk.loads[load]} + v" for load in loads]
    return min(CHUNK, body.walk.length), places, takes


def _registers(step: int, places: Sequence[str]) -> list[str]:
    return [f"const Bytes b{j} = load{step}({place});" for j, place in enumerate(places)]


def _of_floats(body: Body, i: int) -> list[str]:
    at = f"m * call.padded + {i * body.walk.length} + v + part * kFloats"
    return each_float(body, i, [f"for (int m = 0; m < M; ++m) p[r][m] = madd(f, loadf(x + {at}), p[r][m]);"])


def _of_integers(body: Body, i: int) -> list[str]:
    step, places, takes = _loads(body, i)
    element = body.spec.weight.element
    assert isinstance(element, Integer)
    at = f"m * call.padded + {i * body.walk.length} + v"
    return [
        f"      for (int v = 0; v < kLength; v += {step})",
        "        for (int r = 0; r < R; ++r) {",
        *(f"          {line}" for line in _registers(step, places)),
        f"          const Bytes c = {raw(element, takes)};",
        f"          for (int m = 0; m < M; ++m) p[r][m] = dot<{element.bits}>(c, x + {at}, p[r][m]);",
        "        }",
    ]


def _close(body: Body, first: int) -> list[str]:
    """Sums over a group, scaled, go to the sums over the row."""
    k = f"k + {first}"
    lines = [
        f"      const int64_t column = ({body.group(first)}) * call.scale_group;",
        "      for (int r = 0; r < R; ++r) {",
        "        float s, z;",
        "        scales(w, base[r] + column, s, z);",
        "        for (int m = 0; m < M; ++m) {",
    ]
    times = "s"
    if body.token_cols is not None:
        groups = f"(call.k / {body.token_cols})"
        at = f"(m0 + m) * {groups} + std::min<int64_t>({k}, call.k - 1) / {body.token_cols}"
        lines.append(f"          const float t = call.x_scales[{at}];")
        times = "s * t"
    if body.by_integers:
        lines.append(f"          rest[r][m] += static_cast<float>(sum(p[r][m])) * ({times});")
    else:
        lines.append("          total[r][m] = madd(p[r][m], same(s), total[r][m]);")
    if body.needs_sums and body.sum_cols > 0:
        place = f"(m0 + m) * (call.k / {body.sum_cols}) + (k + {first}) / {body.sum_cols}"
        token = " * t" if body.token_cols is not None else ""
        when = f"k + {first} < call.k && (k + {first}) % {body.sum_cols} == 0"
        lines.append(f"          if ({when}) rest[r][m] += z{token} * call.x_sums[{place}];")
    lines += ["        }", "      }"]
    return lines
