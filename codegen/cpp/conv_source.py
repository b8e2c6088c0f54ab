"""From a `ConvSpec` to the C++ source of its kernel: what is done to sixteen sums of a pixel, around fixed
loops.

In: a `ConvSpec`. Out: the text of a file with one `run(call, first pixel, last, first panel, last)`. The
loops are those of `headers/conv.h`; sizes, strides and addresses are in the call, so that layers that
differ in nothing else share one kernel.

    conv 64x32x3x3 p1x1 .. -> relu(add(y0,e0)) e:f32 y:int8[tensor]
    ->  y0 = sum * factor;  r0 = y0 + e0;  r1 = r0 < 0 ? 0 : r0;  codes(r1 times 1 / scale) are stored
"""

from __future__ import annotations

import math
import re

from ..conv import ConvSpec, has_zero
from ..epilogue import Apply, Epilogue, Expression

_INCLUDES = ("<algorithm>", "<cmath>", "<cstdint>", "<cstring>", '"conv.h"')


def source(spec: ConvSpec) -> str:
    """The kernel's file as text."""
    positive = "true" if spec.positive else "false"
    of_x = "1" if spec.depthwise else f"bitfold::kBytes<{positive}>"
    zero = "true" if has_zero(spec.activation) else "false"
    loops = f"depthwise<{zero}>(*call, first, last, from, to, End{{}});"
    if not spec.depthwise:
        loops = f"gemm<{positive}>(*call, first, last, from, to, End{{}});"
    lines = [
        *(f"#include {name}" for name in _INCLUDES),
        "",
        "namespace bitfold {",
        "namespace {",
        "",
        *_end(spec),
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


def _end(spec: ConvSpec) -> list[str]:
    """From the sums of sixteen channels of a pixel to what is stored."""
    reads, norm = spec.epilogue.count("e"), normed(spec.epilogue)
    vectors = range(2 if norm else 0, spec.epilogue.count("v"))
    names = {f"{kind}{i}": f"{kind}{i}" for kind in "yev" for i in range(spec.epilogue.count(kind))}
    names["y0"] = "y0"
    root, bounds = _bounded(_without_norm(spec.epilogue.root) if norm else spec.epilogue.root)
    steps, result = Epilogue(root).cpp(names)
    types = [_type(f) for f in spec.reads]
    loads: list[str] = []
    for i, kind in enumerate(types):
        loads += [
            f"    {kind} given{i}[kLanes] = {{}};",
            f"    std::memcpy(given{i}, static_cast<const {kind}*>(c.reads[{i}]) + place,",
            f"                sizeof({kind}) * count);",
        ]
    added = " + bias[i]" if spec.bias or norm else ""
    body = [f"      const float y0 = static_cast<float>(sums[i]) * factors[i]{added};"]
    for i, kind in enumerate(types):
        read = f"given{i}[i]"
        if kind == "int8_t":
            less = f" - origin{i}" if has_zero(spec.reads[i]) else ""
            read = f"(static_cast<float>({read}){less}) * unit{i}"
        body.append(f"      const float e{i} = {read};")
    body += [f"      const float v{i} = vector{i}[i];" for i in vectors]
    body += [f"      {step}" for step in steps]
    stores: list[str] = []
    body.append(f"      result[i] = {result};")
    for i, f in enumerate(spec.writes):
        to = f"static_cast<{_type(f)}*>(c.writes[{i}]) + place"
        if f is None:
            stores.append(f"    std::memcpy({to}, result, sizeof(float) * count);")
        else:
            stores += [
                f"    int8_t taken{i}[kLanes];",
                f"    codes(result, c.inverses[{i}], {f'c.starts[{i}], ' * has_zero(f)}taken{i});",
                f"    std::memcpy({to}, taken{i}, count);",
            ]
    return [
        "struct End {",
        "  template <bool whole>",
        "  static void lanes(const Conv& c, int64_t pixel, int64_t row, int live,",
        "                    const int32_t* __restrict sums) {",
        "    const int count = whole ? kLanes : live;",
        "    const int64_t place = pixel * c.n + row;",
        "    const float* __restrict factors = c.factors + row;",
        *(["    const float* __restrict bias = c.bias + row;"] if spec.bias or norm else []),
        *(f"    const float* __restrict vector{i} = c.vectors[{i}] + row;" for i in vectors),
        *(f"    const float unit{i} = c.units[{i}];" for i in range(reads) if types[i] == "int8_t"),
        *(f"    const float origin{i} = c.origins[{i}];" for i in range(reads) if has_zero(spec.reads[i])),
        *loads,
        "    alignas(64) float result[kLanes];",
        "#pragma GCC unroll 1  // unrolled first, it is not made vectors of",
        "    for (int i = 0; i < kLanes; ++i) {",
        *body,
        "    }",
        *([f"    between({bounds}, result);"] if bounds else []),
        *stores,
        "  }",
        "  void operator()(const Conv& c, int64_t pixel, int64_t row, int live, const int32_t* sums) const {",
        "    if (live == kLanes) return lanes<true>(c, pixel, row, live, sums);",
        "    lanes<false>(c, pixel, row, live, sums);",
        "  }",
        "};",
        "",
    ]


def _bounded(of: Expression) -> tuple[Expression, str]:
    """An epilogue without the bounds that it ends with, and these: the compiler makes a long way of them."""
    if isinstance(of, Apply) and of.op == "relu":
        return of.operands[0], "0.0f, INFINITY"
    if isinstance(of, Apply) and of.op == "clamp":
        inner, *ends = of.operands
        if all(isinstance(end, float) and math.isfinite(end) for end in ends) and ends[0] <= ends[1]:  # type: ignore[operator]
            return inner, f"{ends[0]!r}f, {ends[1]!r}f"
    return of, ""


_NORM = Apply("add", (Apply("mul", ("y0", "v0")), "v1"))


def normed(epilogue: Epilogue) -> bool:
    """Whether an epilogue begins as a batch norm does, y0 v0 + v1, and reads no other vectors: the operator
    multiplies v0 into what a sum is worth and v1 into the bias, once a call."""
    left = re.search(r"\bv\d", str(_without_norm(epilogue.root)))
    return epilogue.count("v") == 2 and left is None


def _without_norm(of: Expression) -> Expression:
    if of == _NORM:
        return "y0"
    return Apply(of.op, tuple(map(_without_norm, of.operands))) if isinstance(of, Apply) else of


def _type(f: object) -> str:
    return "float" if f is None else "int8_t"
