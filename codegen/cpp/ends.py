"""What a CPU kernel does besides products: scales, and the end of a sum.

In: a `Body`. Out: lines of C++.

    scales     what multiplies the sum over a group, and what is added for each unit of x's sum
    whole      the same for values by themselves
    finish     bias, epilogue, store
"""

from __future__ import annotations

from ..spec import type_name
from .body import Body


def scales(body: Body) -> list[str]:
    """Where a row's scales begin; what multiplies the sum over a group of codes, and what is added to the
    products."""
    scale = body.scale
    rows = scale.granularity.rows if scale is not None else None
    row = "0" if rows is None else ("row" if rows == 1 else f"row / {rows}")
    s = "1.0f" if scale is None else f"{scale.dtype}::get(w.scales, at)"
    zero = "0.0f" if scale is None or scale.zero == "none" else f"{_zeros(body)}::get(w.zeros, at)"
    return [
        f"inline int64_t scales_of(const Call& call, int64_t row) {{ return {row} * call.scale_row; }}",
        "// Of a stored scale and zero point: s and z.",
        "inline void completed(float& s, [[maybe_unused]] float zero, float& z) {",
        f"  z = {body.added() if body.needs_sums else '0.0f'};",
        *([f"  s *= {body.factor};"] if body.factor != "1.0f" else []),
        "}",
        "inline void scales(const Weight& w, int64_t at, float& s, float& z) {",
        f"  s = {s};",
        f"  completed(s, {zero}, z);",
        "}",
        "",
        *([] if body.cols is None else _many_scales(body)),
    ]


def _zeros(body: Body) -> str:
    """How a zero point is stored."""
    assert body.scale is not None
    return ("i8" if body.base else "u8") if body.scale.zero == "int" else body.scale.dtype


def whole(body: Body) -> list[str]:
    """A value of a number f is (f + a) * s + z, each rounded as the reference does: a code that is its zero
    point is 0, whatever the scale, and an infinity that meets it is NaN."""
    scale = body.scale
    kind = scale.zero if scale is not None else "none"
    read = ["  s = 1.0f;"]
    if scale is not None:
        read = [f"  s = {scale.dtype}::get(w.scales, at){' * w.level[0]' if scale.two_level else ''};"]
    if scale is not None and kind != "none":
        read.append(f"  const float zero = {_zeros(body)}::get(w.zeros, at);")
    before, behind = body.apart()
    return [
        "inline void whole(const Weight& w, int64_t at, float& s, float& a, float& z) {",
        *read,
        f"  a = ({before}) / ({body.factor});",
        f"  s *= {body.factor};",
        f"  z = {behind};",
        "}",
        "",
    ]


def _many_scales(body: Body) -> list[str]:
    """The same for `count` groups of a row from `group` on; s and z have room for kRead more."""
    zeros = body.needs_sums and body.sum_cols > 0
    lines = [
        "inline void many_scales(",
        "    const Call& call, const Weight& w, int64_t base, int64_t group, int64_t count,",
        f"    float* __restrict s{', float* __restrict z' if zeros else ''}) {{",
        "  const int64_t at = base + group * call.scale_group;",
        *([] if zeros else ["  float none;"]),
    ]
    to = "s[i], " + ("z[i]" if zeros else "none")
    scale = body.scale
    assert scale is not None
    given = [f"      eight<{scale.dtype}>(w.scales, at + i0, s + i0);"]
    if zeros and scale.zero != "none":
        given.append(f"      eight<{_zeros(body)}>(w.zeros, at + i0, zero);")
    of_each = "zero[i], z[i0 + i]" if zeros else "zero[i], none"
    return [
        *lines,
        "  // In vectors, on into the next row's.",
        "  if (call.scale_group == 1 && at + count + kRead <= call.scale_count) {",
        "    for (int64_t i0 = 0; i0 < count; i0 += kRead) {",
        "      float zero[kRead] = {};",
        *given,
        "#pragma GCC unroll 1  // unrolled first, it is not made vectors of",
        f"      for (int i = 0; i < kRead; ++i) completed(s[i0 + i], {of_each});",
        "    }",
        "  } else {",
        f"    for (int64_t i = 0; i < count; ++i) scales(w, at + i * call.scale_group, {to});",
        "  }",
        # Of codes behind the row's end, where x is zero.
        f"  const int64_t all = std::min<int64_t>(kScales, (call.padded - 1) / {body.cols} + 1 - group);",
        "  for (int64_t i = count; i < all; ++i) s[i] = 0.0f;",
        "}",
        "",
    ]


def finish(body: Body) -> list[str]:
    """Biases, epilogue, store; sums[w] are those of weight w. For R numbers side by side, in vectors."""
    spec, many = body.spec, body.spec.weights
    names = {f"y{i}": f"y{i}" for i in range(many)}
    lines = [
        "// whole: the sums are of complete values.",
        "template <int R, int M, bool whole = false>",
        f"inline void finish(const Call& call, int64_t row, int64_t m0, float (&sums)[{many}][R][M]) {{",
        "  float results[M][R];",
        "  for (int m = 0; m < M; ++m) {",
        "#pragma GCC unroll 1  // unrolled first, it is not made vectors of",
        "    for (int r = 0; r < R; ++r) {",
        "      const int64_t place = (m0 + m) * call.n + row + r;",
    ]
    for i in range(many):
        value = f"sums[{i}][r][m]"
        if body.needs_sums and body.sum_cols < 0:
            lines += ["      float s, z;"] * (i == 0)
            lines += [
                f"      scales(call.weights[{i}], scales_of(call, row + r), s, z);",
            ]
            value = f"(whole ? {value} : {value} + z * call.x_sums[m0 + m])"
        if body.scale is not None and body.scale.two_level:
            value += f" * (whole ? 1.0f : call.weights[{i}].level[0])"
        if body.by_integers and body.token_cols is None:
            value += " * call.x_scales[m0 + m]"
        if spec.bias:
            value += f" + {spec.x}::get(call.weights[{i}].bias, row + r)"
        lines.append(f"      const float y{i} = {value};")
    matrices = spec.epilogue.count("e")
    for i in range(matrices):
        names[f"e{i}"] = f"e{i}"
        lines.append(f"      const float e{i} = {spec.x}::get(call.extras[{i}], place);")
    for i in range(spec.epilogue.count("v")):
        names[f"v{i}"] = f"v{i}"
        lines.append(f"      const float v{i} = {spec.x}::get(call.extras[{matrices + i}], row + r);")
    steps, result = spec.epilogue.cpp(names)
    lines += [f"      {step}" for step in steps]
    put = f"{type_name(spec.out)}::put(call.y, (m0 + m) * call.n + row + r, results[m][r]);"
    return [
        *lines,
        f"      results[m][r] = {result};",
        "    }",
        "  }",
        f"  for (int m = 0; m < M; ++m) for (int r = 0; r < R; ++r) {put}",
        "}",
        "",
    ]
