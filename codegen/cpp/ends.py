"""What a CPU kernel does besides products: scales, the end of a sum, rows of the weight as float32.

In: a `Body`. Out: lines of C++.

    scales     what multiplies the sum over a group, and what is added for each unit of x's sum
    finish     bias, epilogue, store
    decoded    for products with many rows of x, which the library computes from decoded rows
"""

from __future__ import annotations

from ..spec import type_name
from .body import Body
from .products import each_float, units


def scales(body: Body) -> list[str]:
    """Where a row's scales begin; what multiplies the sum over a group of codes, and what is added to the
    products."""
    scale = body.scale
    rows = scale.granularity.rows if scale is not None else None
    row = "0" if rows is None else ("row" if rows == 1 else f"row / {rows}")
    read = ["  s = 1.0f;"]
    if scale is not None:
        read = [f"  s = {scale.dtype}::get(w.scales, at);"]
        if scale.zero != "none":
            kind = ("i8" if body.base else "u8") if scale.zero == "int" else scale.dtype
            read.append(f"  const float zero = {kind}::get(w.zeros, at);")
    return [
        f"inline int64_t scales_of(const Call& call, int64_t row) {{ return {row} * call.scale_row; }}",
        "inline void scales(const Weight& w, int64_t at, float& s, float& z) {",
        *read,
        f"  z = {body.added() if body.needs_sums else '0.0f'};",
        *([f"  s *= {body.factor!r}f;"] if body.factor != 1.0 else []),
        "}",
        "",
    ]


def finish(body: Body) -> list[str]:
    """Biases, epilogue, store; sums[w] are those of weight w."""
    spec, many = body.spec, body.spec.weights
    names = {f"y{i}": f"y{i}" for i in range(many)}
    lines = [
        "// whole: the sums are of complete values.",
        "template <int R, int M, bool whole = false>",
        f"inline void finish(const Call& call, int64_t row, int64_t m0, float (&sums)[{many}][R][M]) {{",
        "  for (int r = 0; r < R; ++r)",
        "    for (int m = 0; m < M; ++m) {",
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
    return [*lines, f"      {type_name(spec.out)}::put(call.y, place, {result});", "    }", "}", ""]


def decoded(body: Body) -> list[str]:
    """The function of that name: one row of the weight as float32."""
    if body.by_integers:
        return []
    level = " * w.level[0]" if body.scale is not None and body.scale.two_level else ""
    lines = [
        "inline void decoded(const Call& call, const Weight& w, int64_t row, float* to) {",
        "  constexpr int R = 1;",
        "  const int64_t base = scales_of(call, row);",
        "  for (int64_t k = 0, at = 0; k < call.k; k += kCodes, at += kUnits) {",
        *units(body),
        "    alignas(64) float run[kCodes];",
    ]
    for first, slices in body.stretches():
        lines += [
            "    {",
            "      float s, z;",
            f"      scales(w, base + ({body.group(first)}) * call.scale_group, s, z);",
            *([f"      s = s{level};"] if level else []),
        ]
        for i in slices:
            place = f"run + {i * body.walk.length} + v + part * kFloats"
            lines += each_float(body, i, [f"storef({place}, madd(f, same(s), same(z)));"])
        lines += ["    }"]
    return [
        *lines,
        "    std::memcpy(to + k, run, sizeof(float) * std::min<int64_t>(kCodes, call.k - k));",
        "  }",
        "}",
        "",
    ]


def whole(body: Body) -> list[str]:
    """What a product with many rows of x is made of: decoded rows, and the end of the sums over them."""
    if body.by_integers:
        return []
    many = body.spec.weights
    return [
        'extern "C" void decode(',
        "    const bitfold::Call* call, int w, int64_t first, int64_t last, float* to) {",
        "  for (int64_t row = first; row < last; ++row)",
        "    bitfold::decoded(*call, call->weights[w], row, to + (row - first) * call->k);",
        "}",
        "// sums: of each weight, [m, count], for rows of the weight from `first` on.",
        'extern "C" void end(const bitfold::Call* call, int64_t first, int64_t count,',
        "                    const float* const* sums, int64_t m0, int64_t m1) {",
        "  for (int64_t m = m0; m < m1; ++m)",
        "    for (int64_t i = 0; i < count; ++i) {",
        f"      float one[{many}][1][1];",
        f"      for (int w = 0; w < {many}; ++w) one[w][0][0] = sums[w][m * count + i];",
        "      bitfold::finish<1, 1, true>(*call, first + i, m, one);",
        "    }",
        "}",
    ]
