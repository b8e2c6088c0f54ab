"""Sums of products for a few rows of the weight and of x: the loop that a CPU kernel's time goes into.

In: a `Body`. Out: lines of C++.

    for each block of a row:  its scales -> float32, many at a time
        for each run:  for each stretch of codes with scales of their own:
            codes -> floats, times x, added up (or codes times int8, in int32);  the sum, scaled, to the row's

A vector of sums stands for each pair of rows until the row's end; four are then summed up at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...formats import Integer
from ..slices import Take, renumbered
from .body import Body
from .values import decode, raw

CHUNK = 32  # bytes of a vector
# With several rows of x, a line of codes is worth so much work that a processor does not get to the next one
# by itself: the rows after these are asked for. With one row its own foresight is better.
AHEAD = (
    "      if constexpr (M > 1)",
    "        for (int r = 0; r < R; ++r)",
    "          for (int b = 0; b < kUnits; b += kLine) ahead(codes_of_row + (R + r) * stride + at + b);",
)
_JOINED = "for (int a = 1; a < A; ++a) p[r][m][0] = plus(p[r][m][0], p[r][m][a]);"


def tile(body: Body) -> list[str]:
    """The function of that name: R rows of the weight times M rows of x."""
    many, none = ("Ints", "no_ints") if body.by_integers else ("Floats", "zeros")
    sums, nothing = ("Sums", "no_sums") if body.by_integers else ("Floats", "zeros")
    element = "int8_t" if body.by_integers else "float"
    fresh = [
        f"{many} p[R][M][A];",
        "for (int r = 0; r < R; ++r)",
        "  for (int m = 0; m < M; ++m)",
        f"    for (int a = 0; a < A; ++a) p[r][m][a] = {none}();",
    ]
    # A sum waits for the one before: a short tile needs several for each row.
    most = 4 if body.whole_rows else 2
    chains = "1" if body.by_integers else f"R * M >= 4 ? 1 : std::min(R * M == 1 ? {most} : 2, kParts)"
    head = [
        "// out[r][m]: rows row .. row + R - 1 of the weight times rows m0 .. m0 + M - 1 of x.",
        "template <int R, int M>",
        "inline void tile(",
        "    const Call& call, const Weight& w, int64_t row, int64_t m0, float (*out)[M]) {",
        f"  constexpr int A = {chains};",
        "  const int64_t padded = call.padded, stride = call.stride;",
        f"  const {element}* const rows = static_cast<const {element}*>(call.x) + m0 * padded;",
        "  const uint8_t* const codes_of_row = w.codes + row * stride;",
        f"  {sums} total[R * M];",
        "  float rest[R][M];",
        "  for (int r = 0; r < R; ++r)",
        f"    for (int m = 0; m < M; ++m) total[r * M + m] = {nothing}(), rest[r][m] = 0.0f;",
        *(f"  {line}" for line in fresh if body.whole_rows),
        "  int64_t base[R];",
        "  for (int r = 0; r < R; ++r) base[r] = scales_of(call, row + r);",
    ]
    run = [
        *units(body),
        *AHEAD,
        f"      const {element}* x[M];  // one address each: others would not fit in registers",
        "      for (int m = 0; m < M; ++m) x[m] = one_address(rows + k + m * padded);",
    ]
    for first, slices in body.stretches():
        run += ["      {", *(f"        {line}" for line in fresh if not body.whole_rows)]
        for i in slices:
            run += _of_integers(body, i) if body.by_integers else _of_floats(body, i)
        run += [*([] if body.whole_rows else _close(body, first)), "      }"]
    blocks = [
        "  for (int64_t k0 = 0, at = 0; k0 < call.k; k0 += kBlock) {",
        f"    const int64_t end = {last(body)};",
        *opened(body),
        "    for (int64_t k = k0; k < end; k += kCodes, at += kUnits) {",
    ]
    plain = ["  {", "    for (int64_t k = 0, at = 0; k < call.k; k += kCodes, at += kUnits) {"]
    return [
        *head,
        *tail(body),
        *(plain if body.cols is None else blocks),
        *run,
        "    }",
        "  }",
        *(_whole_row(body) if body.whole_rows else []),
        "  float across[R * M];",
        "  added_up<R * M>(total, across);",
        "  for (int r = 0; r < R; ++r)",
        "    for (int m = 0; m < M; ++m) out[r][m] = across[r * M + m] + rest[r][m];",
        "}",
        "",
    ]


def last(body: Body) -> str:
    """Where a block's codes end: groups side by side end together, behind what fills the last ones."""
    return f"std::min<int64_t>(k0 + kBlock, call.{'k' if body.span is None else 'padded'})"


def place(body: Body) -> str:
    """Where the units of this run of row r are: `tail` stands before the loop over runs."""
    found = "codes_of_row + r * stride + at"
    return f"k + kCodes > call.k ? tail[r] : {found}" if body.cut_short else found


def units(body: Body) -> list[str]:
    """Those of each row."""
    return [
        "      const uint8_t* u[R];",
        f"      for (int r = 0; r < R; ++r) u[r] = {place(body)};",
    ]


def tail(body: Body) -> list[str]:
    """The units of each row's last run, if codes end within it: what follows is the next row, or no memory.
    Not in the loop over runs: beside a call the compiler keeps sums in memory."""
    if not body.cut_short:
        return []
    return [
        "  uint8_t tail[R][kUnits + 32];",
        "  if (const int64_t over = call.k % kCodes; over != 0)",
        "    for (int r = 0; r < R; ++r) {",
        "      std::memset(tail[r], 0, sizeof tail[r]);",
        "      std::memcpy(tail[r], codes_of_row + r * stride + call.k / kCodes * kUnits, over);",
        "    }",
    ]


def each_float(body: Body, i: int, use: Sequence[str], before: Sequence[str] = ()) -> list[str]:
    """Slice i of R rows as vectors of floats: `use` has each, `f`, of row r; it is number `part` of the chunk
    of the slice that begins at code v. `before`: what the rows share."""
    step, places, takes = loads(body, i)
    made = decode(body.spec.weight.element, takes)
    if made.bytes == "b0" and not body.held:  # as they lie: widening reads memory
        kept, codes = "const uint8_t* codes[R];", [f"codes[r] = {places[0]};"]
    elif body.held:
        kept, codes = "Held codes[R];", [*registers(step, places), f"codes[r] = held({made.bytes});"]
    else:
        kept = "alignas(32) uint8_t codes[R][32];"
        codes = [*registers(step, places), f"store(codes[r], {made.bytes});"]
    floats = "of_held<part>(codes[r])" if body.held else made.floats.replace("codes)", "codes[r])")
    return [
        f"        for (int v = 0; v < kLength; v += {step}) {{",
        f"          {kept}",
        "          for (int r = 0; r < R; ++r) {",
        *(f"            {line}" for line in codes),
        "          }",
        f"          unrolled<{step} / kFloats>([&](auto part_) {{",
        "            constexpr int part = decltype(part_)::value;",
        *(f"            {line}" for line in before),
        "            for (int r = 0; r < R; ++r) {",
        f"              const Floats f = {floats};",
        *(f"              {line}" for line in use),
        "            }",
        "          });",
        "        }",
    ]


def loads(body: Body, i: int) -> tuple[int, list[str], list[Take]]:
    """(bytes of a step, where the bytes of each load of slice i are, how its codes are taken out of them)"""
    ((takes,), read) = renumbered(body.walk.slices[i : i + 1])
    places = [f"u[r] + {body.walk.loads[load]} + v" for load in read]
    return min(CHUNK, body.walk.length), places, takes


def registers(step: int, places: Sequence[str]) -> list[str]:
    """The loads, as b0, b1 .."""
    return [f"const Bytes b{j} = load{step}({place});" for j, place in enumerate(places)]


def _of_floats(body: Body, i: int) -> list[str]:
    at = f"{i * body.walk.length} + v + part * kFloats"
    # Rows of the weight share what is loaded of x: loads are two a cycle, as many as products.
    before = [
        "Floats y[M];",
        f"for (int m = 0; m < M; ++m) y[m] = shared<R>(loadf(x[m] + {at}));",
    ]
    use = "p[r][m][part % A] = madd(f, y[m], p[r][m][part % A]);"
    return each_float(body, i, [f"for (int m = 0; m < M; ++m) {use}"], before)


def _of_integers(body: Body, i: int) -> list[str]:
    step, places, takes = loads(body, i)
    element = body.spec.weight.element
    assert isinstance(element, Integer)
    at = f"{i * body.walk.length} + v"
    return [
        f"        for (int v = 0; v < kLength; v += {step})",
        "          for (int r = 0; r < R; ++r) {",
        *(f"            {line}" for line in registers(step, places)),
        f"            const Bytes c = {raw(element, takes)};",
        "            for (int m = 0; m < M; ++m)",
        f"              p[r][m][0] = dot<{element.bits}>(c, x[m] + {at}, p[r][m][0]);",
        "          }",
    ]


def opened(body: Body) -> list[str]:
    """The scales of a block of each row; what zero points add, times x's sums, goes to `rest`."""
    lines = [
        "    alignas(64) float s[R][kScales + kRead];",
        "    for (int r = 0; r < R; ++r) {",
        f"      const int64_t group = k0 / {body.cols};",
        "      const int64_t count = std::min<int64_t>(kScales, call.groups - group);",
    ]
    if not (body.needs_sums and body.sum_cols > 0):
        return [*lines, "      many_scales(call, w, base[r], group, count, s[r]);", "    }"]
    sums, cols = body.sum_cols, body.cols
    tokens = ""
    if body.token_cols is not None:
        row = f"(m0 + m) * (call.k / {body.token_cols})"
        tokens = f" * call.x_scales[{row} + j * {sums} / {body.token_cols}]"
    return [
        *lines,
        "      alignas(64) float z[kScales + kRead];",
        "      many_scales(call, w, base[r], group, count, s[r], z);",
        f"      const int64_t first = k0 / {sums}, last = (k0 + count * {cols}) / {sums};",
        "      for (int m = 0; m < M; ++m) {",
        f"        const float* sums = call.x_sums + (m0 + m) * (call.k / {sums});",
        *(
            ["        rest[r][m] += dotted(z, sums + first, last - first);"]
            if sums == cols and not tokens
            else [
                "        for (int64_t j = first; j < last; ++j)",
                f"          rest[r][m] += z[j * {sums} / {cols} - group] * sums[j]{tokens};",
            ]
        ),
        "      }",
        "    }",
    ]


def _close(body: Body, first: int) -> list[str]:
    """Sums over a group, scaled, go to the sums over the row."""
    k = f"k + {first}"
    scale = f"s[r][(k - k0 + {first}) / {body.cols}]" if body.cols is not None else "s"
    if body.span is not None:
        scale = "loadf(s[r] + (k - k0) / kSpan * kGroups)"
    lines = ["        for (int r = 0; r < R; ++r) {"]
    if body.cols is None:
        lines += ["          float s, z;", "          scales(w, base[r], s, z);"]
    lines += ["          for (int m = 0; m < M; ++m) {"]
    if body.token_cols is not None:
        groups = f"(call.k / {body.token_cols})"
        at = f"(m0 + m) * {groups} + std::min<int64_t>({k}, call.k - 1) / {body.token_cols}"
        lines.append(f"            const float t = call.x_scales[{at}];")
        scale = f"{scale} * t"
    if not body.by_integers:
        lines.append(f"            {_JOINED}")
    if body.by_integers:
        lines.append(f"            total[r * M + m] = scaled(p[r][m][0], {scale}, total[r * M + m]);")
    else:
        vector = scale if body.span is not None else f"same({scale})"
        lines.append(f"            total[r * M + m] = madd(p[r][m][0], {vector}, total[r * M + m]);")
    if body.needs_sums and body.sum_cols > 0 and body.cols is None:
        place = f"(m0 + m) * (call.k / {body.sum_cols}) + (k + {first}) / {body.sum_cols}"
        when = f"k + {first} < call.k && (k + {first}) % {body.sum_cols} == 0"
        lines.append(f"            if ({when}) rest[r][m] += z * t * call.x_sums[{place}];")
    return [*lines, "          }", "        }"]


def _whole_row(body: Body) -> list[str]:
    """One scale a row: it waits until the row is summed up, integers exactly."""
    use = (
        "rest[r][m] = static_cast<float>(sum(p[r][m][0])) * s;"
        if body.by_integers
        else "total[r * M + m] = mul(p[r][m][0], same(s));"
    )
    return [
        "  for (int r = 0; r < R; ++r) {",
        "    float s, z;",
        "    scales(w, base[r], s, z);",
        "    for (int m = 0; m < M; ++m) {",
        *([] if body.by_integers else [f"      {_JOINED}"]),
        f"      {use}",
        "    }",
        "  }",
    ]
