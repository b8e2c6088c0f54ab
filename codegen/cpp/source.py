"""From a spec to the C++ source of its kernel: a product with few rows of x, as fast as codes can be read.

In: a `GemmSpec`. Out: the text of a file with one `run(call, first, last)`, for rows first .. last - 1 of the
weight; what varies from call to call (n, k, the number of rows of x, addresses) is in the call, so that all
layers of a format share one kernel. Nothing in it names a format.

    linear 1536x576 f32 int4[g64,planar]
    ->  for each run of 64 codes: two slices of 32 nibbles -> floats, times x, added up; times the scale

Rows of the weight are taken a few at a time and rows of x up to four; a vector of sums for each pair is added
up over the row, and only then across its numbers. With activations in int8 the sums of a group are int32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ...formats import Integer, Scale
from ...formats.rules import middle
from ..slices import BYTE, Unwalkable, Walk, walk
from ..spec import GemmSpec
from ..triton.operand import renumbered
from .values import Decode, decode, raw

# Rows of the weight taken together with 1, 2 and 4 rows of x: enough sums in flight for the multipliers.
ROWS = {1: 4, 2: 4, 4: 2}
CHUNK = 32  # bytes of a vector
RUN_OF_BYTES = 64  # of codes in order: longer runs of a row of 576 would end in padding
TYPES = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Body:
    """A kernel's text and what surrounds it must know: codes of a run, numbers that share an entry of
    x_sums (0: none are needed, -1: the whole row)."""

    spec: GemmSpec

    @cached_property
    def walk(self) -> Walk:
        found = walk_of(self.spec)
        assert isinstance(found, Walk)
        return found

    @property
    def scale(self) -> Scale | None:
        return self.spec.weight.scale

    @property
    def by_integers(self) -> bool:
        """Whether products of 8-bit integers are added up in int32."""
        return self.spec.activation is not None

    @cached_property
    def decode(self) -> Decode:
        return decode(self.spec.weight.element, renumbered(self.walk.slices[0])[0])

    @property
    def cols(self) -> int | None:
        """Numbers of a row that share a scale of the weight."""
        return self.scale.granularity.cols if self.scale is not None else None

    @property
    def token_cols(self) -> int | None:
        """Numbers of a row of x that share a scale."""
        scale = self.spec.activation.scale if self.spec.activation is not None else None
        return scale.granularity.cols if scale is not None else None

    @property
    def whole_rows(self) -> bool:
        """Whether one scale multiplies all of a row, so that a sum goes over all of it."""
        return self.cols is None and self.token_cols is None

    @property
    def needs_sums(self) -> bool:
        """Whether something is added to scaled values, so that x's sums are needed."""
        zero = self.scale is not None and self.scale.zero != "none"
        return zero or (self._base != 0 if self.by_integers else self.decode.middle != 0)

    @property
    def sum_cols(self) -> int:
        if not self.needs_sums:
            return 0
        held = [cols for cols in (self.cols, self.token_cols) if cols is not None]
        return min(held, default=-1)

    @property
    def _base(self) -> int:
        """How much more than the integer the unsigned code is."""
        element = self.spec.weight.element
        return 1 << (element.bits - 1) if isinstance(element, Integer) and element.signed else 0

    # --- the text ----------------------------------------------------------------------------------------

    def source(self) -> str:
        """The file's text."""
        w = self.walk
        lines = [
            f"// {self}",
            "#include <algorithm>",
            '#include "kernel.h"',
            "#include VECTORS",
            '#include "numbers.h"',
            "",
            "namespace bitfold {",
            "namespace {",
            "",
            f"constexpr int kCodes = {w.codes}, kUnits = {w.units}, kLength = {w.length};",
            *([self.decode.table] if self.decode.table and not self.by_integers else []),
            "template <class T> inline float rounded(float v) {",
            "  float r[1];",
            "  T::put(r, 0, v);",
            "  return T::get(r, 0);",
            "}",
            "",
            *self._scales(),
            *self._tile(),
            *self._decoded(),
            *self._finish(),
            *self._rows(),
            "}  // namespace",
            "}  // namespace bitfold",
            "",
            'extern "C" void run(const bitfold::Call* call, int64_t first, int64_t last) {',
            "  bitfold::rows(*call, first, last);",
            "}",
            *self._whole(),
        ]
        return "\n".join(lines) + "\n"

    def _scales(self) -> list[str]:
        """Where a row's scales begin; what multiplies the sum over a group of codes, and what is added to the
        products."""
        scale = self.scale
        rows = scale.granularity.rows if scale is not None else None
        row = "0" if rows is None else ("row" if rows == 1 else f"row / {rows}")
        body = ["  s = 1.0f;"]
        if scale is not None:
            body = [f"  s = {scale.dtype}::get(w.scales, at);"]
            if scale.zero != "none":
                kind = ("i8" if self._base else "u8") if scale.zero == "int" else scale.dtype
                body.append(f"  const float zero = {kind}::get(w.zeros, at);")
        return [
            f"inline int64_t scales_of(const Call& call, int64_t row) {{ return {row} * call.scale_row; }}",
            "inline void scales(const Weight& w, int64_t at, float& s, float& z) {",
            *body,
            f"  z = {self._added() if self.needs_sums else '0.0f'};",
            *([f"  s *= {self._factor!r}f;"] if self._factor != 1.0 else []),
            "}",
            "",
        ]

    @property
    def _unit(self) -> float:
        element = self.spec.weight.element
        return 2.0**-element.fraction if isinstance(element, Integer) else 1.0

    @property
    def _factor(self) -> float:
        return self._unit if self.by_integers else self.decode.factor

    def _added(self) -> str:
        """Per unit of x's sum; sums of integers hold codes that are `_base` too high."""
        element = self.spec.weight.element
        middles = float(middle(element)) if isinstance(element, Integer) else 0.0
        over = -self._base * self._unit if self.by_integers else self.decode.middle
        zero = self.scale.zero if self.scale is not None else "none"
        terms = {
            "none": f"{over!r}f * s",
            "int": f"({over!r}f - zero) * s",
            "float": f"zero - {middles - over!r}f * s",
            "min": f"zero + {over!r}f * s",
        }
        return terms[zero]

    def _tile(self) -> list[str]:
        sums = "Ints" if self.by_integers else "Floats"
        element = "int8_t" if self.by_integers else "float"
        lines = [
            "// out[r][m]: rows row .. row + R - 1 of the weight times rows m0 .. m0 + M - 1 of x.",
            "template <int R, int M>",
            "inline void tile(",
            "    const Call& call, const Weight& w, int64_t row, int64_t m0, float (&out)[R][M]) {",
            "  Floats total[R][M];",
            "  float rest[R][M];",
            "  for (int r = 0; r < R; ++r)",
            "    for (int m = 0; m < M; ++m) total[r][m] = zeros(), rest[r][m] = 0.0f;",
            "  int64_t base[R];",
            "  for (int r = 0; r < R; ++r) base[r] = scales_of(call, row + r);",
            "  for (int64_t k = 0, at = 0; k < call.k; k += kCodes, at += kUnits) {",
            *self._units(),
            f"    const {element}* x = static_cast<const {element}*>(call.x) + m0 * call.padded + k;",
        ]
        fresh = [
            f"{sums} p[R][M];",
            "for (int r = 0; r < R; ++r)",
            f"  for (int m = 0; m < M; ++m) p[r][m] = {'no_ints' if self.by_integers else 'zeros'}();",
        ]
        if self.whole_rows:
            at = next(i for i, line in enumerate(lines) if "int64_t base[R]" in line)
            lines[at:at] = [f"  {line}" for line in fresh]
        for first, slices in self._groups():
            lines += ["    {", *(f"      {line}" for line in ([] if self.whole_rows else fresh))]
            for i in slices:
                lines += self._slice(i)
            lines += ([] if self.whole_rows else self._close(first)) + ["    }"]
        lines += [
            "  }",
            *(["  {", "    const int64_t k = 0;", *self._close(0), "  }"] if self.whole_rows else []),
            "  for (int r = 0; r < R; ++r)",
            "    for (int m = 0; m < M; ++m) out[r][m] = sum(total[r][m]) + rest[r][m];",
            "}",
            "",
        ]
        return lines

    def _groups(self) -> list[tuple[int, list[int]]]:
        """(first code, slices) of each stretch of a run whose codes share their scales."""
        found: list[tuple[int, list[int]]] = []
        held = [cols for cols in (self.cols, self.token_cols) if cols is not None]
        for i in range(len(self.walk.slices)):
            start = i * self.walk.length
            codes = self.walk.codes
            apart = any(codes % cols and cols % codes for cols in held)
            if not found or apart or any(start % cols == 0 for cols in held if cols < codes):
                found.append((start, []))
            found[-1][1].append(i)
        return found

    @property
    def _cut_short(self) -> bool:
        """Whether a row may end within a run: its last loads would go on into the next row."""
        return self.spec.weight.layout.name == "bytes"

    def _units(self) -> list[str]:
        """Where the units of this run are, for each row."""
        lines = [
            "    const uint8_t* u[R];",
            "    for (int r = 0; r < R; ++r) u[r] = w.codes + (row + r) * call.stride + at;",
        ]
        if not self._cut_short:
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

    def _slice(self, i: int) -> list[str]:
        w = self.walk
        takes, loads = renumbered(w.slices[i])
        starts = [w.loads[load] for load in loads]
        step = min(CHUNK, w.length)
        names = [f"const Bytes b{j} = load{step}(u[r] + {start} + v);" for j, start in enumerate(starts)]
        at = i * w.length
        lines = [
            f"      for (int v = 0; v < kLength; v += {step})",
            "        for (int r = 0; r < R; ++r) {",
        ]
        if self.by_integers:
            element = self.spec.weight.element
            assert isinstance(element, Integer)
            lines += [
                *(f"          {name}" for name in names),
                f"          const Bytes c = {raw(element, takes)};",
                "          for (int m = 0; m < M; ++m)",
                f"            p[r][m] = dot<{element.bits}>(c, x + m * call.padded + {at} + v, p[r][m]);",
                "        }",
            ]
            return lines
        made = decode(self.spec.weight.element, takes)
        lines += [f"          {name}" for name in names] if made.bytes != "b0" else []
        lines += [
            *self._kept(made, starts),
            f"          unrolled<{step} / kFloats>([&](auto part_) {{",
            "            constexpr int part = decltype(part_)::value;",
            f"            const Floats f = {made.floats};",
            "            for (int m = 0; m < M; ++m) {",
            f"              const float* at = x + m * call.padded + {at} + v + part * kFloats;",
            "              p[r][m] = madd(f, loadf(at), p[r][m]);",
            "            }",
            "          });",
            "        }",
        ]
        return lines

    def _kept(self, made: Decode, starts: list[int]) -> list[str]:
        """`codes`, in memory: widening reads it there."""
        if made.bytes == "b0":
            return [f"          const uint8_t* codes = u[r] + {starts[0]} + v;"]
        return ["          alignas(32) uint8_t codes[32];", f"          store(codes, {made.bytes});"]

    def _close(self, first: int) -> list[str]:
        """Sums over a group, scaled, go to the sums over the row."""
        k = f"k + {first}"
        lines = [
            f"      const int64_t column = ({self._group(first)}) * call.scale_group;",
            "      for (int r = 0; r < R; ++r) {",
            "        float s, z;",
            "        scales(w, base[r] + column, s, z);",
            "        for (int m = 0; m < M; ++m) {",
        ]
        times = "s"
        if self.token_cols is not None:
            groups = f"(call.k / {self.token_cols})"
            at = f"(m0 + m) * {groups} + std::min<int64_t>({k}, call.k - 1) / {self.token_cols}"
            lines.append(f"          const float t = call.x_scales[{at}];")
            times = "s * t"
        if self.by_integers:
            lines.append(f"          rest[r][m] += static_cast<float>(sum(p[r][m])) * ({times});")
        else:
            lines.append("          total[r][m] = madd(p[r][m], same(s), total[r][m]);")
        if self.needs_sums and self.sum_cols > 0:
            place = f"(m0 + m) * (call.k / {self.sum_cols}) + (k + {first}) / {self.sum_cols}"
            token = " * t" if self.token_cols is not None else ""
            when = f"k + {first} < call.k && (k + {first}) % {self.sum_cols} == 0"
            lines.append(f"          if ({when}) rest[r][m] += z{token} * call.x_sums[{place}];")
        lines += ["        }", "      }"]
        return lines

    def _group(self, first: int) -> str:
        """The column of the scales for code k + first; behind the row's end, where x is zero, the last."""
        if self.cols is None:
            return "0"
        run, codes = "k / kCodes", self.walk.codes
        if codes % self.cols == 0:
            found = f"({run}) * {codes // self.cols} + {first // self.cols}"
        elif self.cols % codes == 0:
            found = f"({run}) / {self.cols // codes}"
        else:
            found = f"(k + {first}) / {self.cols}"
        return f"std::min<int64_t>({found}, call.groups - 1)"

    def _finish(self) -> list[str]:
        """Biases, epilogue, store; sums[w] are those of weight w."""
        spec, many = self.spec, self.spec.weights
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
            if self.needs_sums and self.sum_cols < 0:
                lines += [
                    "      float s, z;" if i == 0 else "",
                    f"      scales(call.weights[{i}], scales_of(call, row + r), s, z);",
                ]
                value = f"(whole ? {value} : {value} + z * call.x_sums[m0 + m])"
            if self.scale is not None and self.scale.two_level:
                value += f" * (whole ? 1.0f : call.weights[{i}].level[0])"
            if self.by_integers and self.token_cols is None:
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
        out = next(name for name in TYPES if str(spec.out) == _TORCH[name])
        return [line for line in lines if line] + [
            f"      {out}::put(call.y, place, {result});",
            "    }",
            "}",
            "",
        ]

    def _decoded(self) -> list[str]:
        """A row of the weight as float32, for products with many rows of x, which the library computes."""
        if self.by_integers:
            return []
        lines = [
            "inline void decoded(const Call& call, const Weight& w, int64_t row, float* to) {",
            "  constexpr int R = 1;",
            "  const int64_t base = scales_of(call, row);",
            "  for (int64_t k = 0, at = 0; k < call.k; k += kCodes, at += kUnits) {",
            *self._units(),
            "    constexpr int r = 0;",
            "    alignas(64) float run[kCodes];",
        ]
        level = " * w.level[0]" if self.scale is not None and self.scale.two_level else ""
        for first, slices in self._groups():
            lines += [
                "    {",
                "      float s, z;",
                f"      scales(w, base + ({self._group(first)}) * call.scale_group, s, z);",
                *([f"      s = s{level};"] if level else []),
            ]
            for i in slices:
                made, step, names = self._loaded(i)
                lines += [
                    f"      for (int v = 0; v < kLength; v += {step}) {{",
                    *(f"        {name}" for name in names),
                    f"        unrolled<{step} / kFloats>([&](auto part_) {{",
                    "          constexpr int part = decltype(part_)::value;",
                    f"          const Floats f = {made.floats};",
                    f"          storef(run + {i * self.walk.length} + v + part * kFloats, "
                    "madd(f, same(s), same(z)));",
                    "        });",
                    "      }",
                ]
            lines += ["    }"]
        return [
            *lines,
            "    std::memcpy(to + k, run, sizeof(float) * std::min<int64_t>(kCodes, call.k - k));",
            "  }",
            "}",
            "",
        ]

    def _loaded(self, i: int) -> tuple[Decode, int, list[str]]:
        """How slice i is decoded, the bytes of a step, and the lines that load them and make `codes`."""
        takes, loads = renumbered(self.walk.slices[i])
        starts = [self.walk.loads[load] for load in loads]
        step = min(CHUNK, self.walk.length)
        made = decode(self.spec.weight.element, takes)
        names = [f"const Bytes b{j} = load{step}(u[r] + {start} + v);" for j, start in enumerate(starts)]
        kept = [line.strip() for line in self._kept(made, starts)]
        return made, step, [*(names if made.bytes != "b0" else []), *kept]

    def _whole(self) -> list[str]:
        """What a product with many rows of x is made of: decoded rows, and the end of the sums over them."""
        if self.by_integers:
            return []
        many = self.spec.weights
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

    def _rows(self) -> list[str]:
        many = self.spec.weights
        return [
            "template <int R, int M>",
            "inline void block(const Call& call, int64_t row, int64_t m0) {",
            f"  float sums[{many}][R][M];",
            f"  for (int w = 0; w < {many}; ++w) tile<R, M>(call, call.weights[w], row, m0, sums[w]);",
            "  finish<R, M>(call, row, m0, sums);",
            "}",
            "",
            "// Rows row .. row + R - 1, `most` of them at a time.",
            "template <int most, int M, int R>",
            "inline void each_row(const Call& call, int64_t row, int64_t m0) {",
            "  constexpr int step = most < R ? most : R;",
            "  for (int r = 0; r < R; r += step) block<step, M>(call, row + r, m0);",
            "}",
            "",
            "template <int R>",
            "inline void few(const Call& call, int64_t row) {",
            "  int64_t m = 0;",
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

    def __str__(self) -> str:
        """The spec without the sizes that the kernel does not depend on."""
        return kind(self.spec)


_TORCH = {"f32": "torch.float32", "bf16": "torch.bfloat16", "f16": "torch.float16"}


def kind(spec: GemmSpec) -> str:
    """The spec's text without its sizes: specs alike share a kernel."""
    first, size, *rest = str(spec).split(" ", 2)
    assert size == f"{spec.n}x{spec.k}"
    return " ".join([first, *rest])


def walk_of(spec: GemmSpec) -> Walk | Unwalkable:
    """How the kernel walks over a row: in bytes."""
    held = [f.scale.granularity.cols for f in (spec.weight, spec.activation) if f is not None and f.scale]
    cut = math.gcd(*(cols for cols in held if cols is not None))
    return walk(spec.weight, spec.k, BYTE, cut, RUN_OF_BYTES)


def source(spec: GemmSpec) -> str:
    """The kernel's file as text."""
    return Body(spec).source()
