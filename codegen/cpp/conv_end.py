"""What is done to sixteen sums of a pixel: the `End` that the loops of `headers/conv.h` call, as C++.

In: a `ConvSpec`. Out: lines of a struct.

    .. -> relu(add(y0,e0)) e:f32 y:int8[tensor]
    ->  y0 = sum * factor;  r0 = y0 + e0;  r1 = r0 < 0 ? 0 : r0;  codes(r1 times 1 / scale) are stored

It is written as a loop over sixteen numbers, for any epilogue, any number of channels and any vectors; and,
where the epilogue is arithmetic, in registers (`headers/conv_ends.h`), which what is read of the weight stays
in from pixel to pixel. Both give the same bits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

from ...formats import Format
from ..conv import ConvSpec, has_zero
from ..epilogue import Apply, Epilogue, Expression

_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "neg", "f32"})


def end(spec: ConvSpec) -> list[str]:
    """From the sums of sixteen channels of a pixel to what is stored."""
    ended = _End(spec)
    if not ended.arithmetic:
        return [*_OPENING, _MAKER, *ended.lanes(), *_without_registers()]
    held = ["#if defined(BITFOLD_FLOATS)", *ended.held(), "#else", _MAKER, "#endif"]
    return [*_OPENING, *held, *ended.lanes(), *_CALLS]


_MAKER = "  End(const Conv& c, int64_t row, int live) : c(c), row(row), live(live) {}"
_OPENING = ("struct End {", "  const Conv& c;", "  const int64_t row;", "  const int live;")
_CALLS = (
    "  template <int rows>",
    "  void all(int64_t pixel, const int32_t (*sums)[kChannels]) const {",
    "#if defined(BITFOLD_FLOATS)",
    "    if (live == kChannels && rising) {",
    "      const End own = *this;  // else each store might change it, for all a compiler knows",
    "#pragma GCC unroll 8",
    "      for (int r = 0; r < rows; ++r) own.template registers<kParts>(pixel + r, sums[r]);",
    "      return;",
    "    }",
    "#endif",
    "    for (int r = 0; r < rows; ++r) (*this)(pixel + r, sums[r]);",
    "  }",
    "  void operator()(int64_t pixel, const int32_t* sums) const {",
    "#if defined(BITFOLD_FLOATS)",
    "    if (live == kChannels && rising) return registers<kParts>(pixel, sums);",
    "    if (live == kAtOnce && rising) return registers<1>(pixel, sums);",
    "#endif",
    "    if (live == kChannels) return lanes<true>(pixel, sums);",
    "    lanes<false>(pixel, sums);",
    "  }",
    "};",
    "",
)


def _without_registers() -> list[str]:
    """The calls of an end that is a loop only."""
    found, inside = [], False
    for line in _CALLS:
        inside = inside or line.startswith("#if")
        found += [] if inside else [line]
        inside = inside and not line.startswith("#endif")
    return found


@dataclass(frozen=True)
class _End:
    """Both forms of a spec's end."""

    spec: ConvSpec

    @property
    def norm(self) -> bool:
        return normed(self.spec.epilogue)

    @cached_property
    def bounded(self) -> tuple[Expression, tuple[str, str] | None]:
        """The expression without a batch norm, which is in factors and bias, and its bounds."""
        root = self.spec.epilogue.root
        return _bounded(_without_norm(root) if self.norm else root)

    @property
    def arithmetic(self) -> bool:
        """Whether the compiler's own operators on vectors compute it."""
        return _is_arithmetic(self.bounded[0])

    @property
    def types(self) -> list[str]:
        """Of what is read."""
        return [_type(f) for f in self.spec.reads]

    @property
    def added(self) -> bool:
        return self.spec.bias or self.norm

    @property
    def vectors(self) -> range:
        """Numbers of the vectors that the expression reads."""
        return range(2 if self.norm else 0, self.spec.epilogue.count("v"))

    def steps(self) -> tuple[list[str], str]:
        """Lines of the expression, and its result."""
        counted = self.spec.epilogue.count
        names = {f"{kind}{i}": f"{kind}{i}" for kind in "yev" for i in range(counted(kind))}
        names["y0"] = "y0"
        return Epilogue(self.bounded[0]).cpp(names)

    def read(self, i: int, given: str, one: str) -> str:
        """The number that `given` stands for; `one`: how a float is made what is computed with."""
        if self.types[i] != "int8_t":
            return given
        less = f" - {one.format(f'c.origins[{i}]')}" if has_zero(self.spec.reads[i]) else ""
        return f"({given}{less}) * {one.format(f'c.units[{i}]')}"

    # ---- a loop over sixteen numbers ----

    def lanes(self) -> list[str]:
        """`lanes<whole>(pixel, sums)`."""
        steps, result = self.steps()
        bounds = self.bounded[1]
        loads: list[str] = []
        for i, kind in enumerate(self.types):
            loads += [
                f"    {kind} given{i}[kChannels] = {{}};",
                f"    std::memcpy(given{i}, static_cast<const {kind}*>(c.reads[{i}]) + place,",
                f"                sizeof({kind}) * count);",
            ]
        added = " + bias[i]" if self.added else ""
        body = [f"      const float y0 = static_cast<float>(sums[i]) * factors[i]{added};"]
        for i in range(len(self.types)):
            body.append(f"      const float e{i} = {self.read(i, f'static_cast<float>(given{i}[i])', '{}')};")
        body += [f"      const float v{i} = vector{i}[i];" for i in self.vectors]
        body += [f"      {step}" for step in steps]
        stores: list[str] = []
        body.append(f"      result[i] = {result};")
        for i, f in enumerate(self.spec.writes):
            if f is None:
                stores.append(f"    std::memcpy({_to(i, f)}, result, sizeof(float) * count);")
            else:
                stores += [
                    f"    int8_t taken{i}[kChannels];",
                    f"    codes(result, c.inverses[{i}], {f'c.starts[{i}], ' * has_zero(f)}taken{i});",
                    f"    std::memcpy({_to(i, f)}, taken{i}, count);",
                ]
        return [
            "  template <bool whole>",
            "  void lanes(int64_t pixel, const int32_t* __restrict sums) const {",
            "    const int count = whole ? kChannels : live;",
            "    const int64_t place = pixel * c.n + row;",
            "    const float* __restrict factors = c.factors + row;",
            *(["    const float* __restrict bias = c.bias + row;"] if self.added else []),
            *(f"    const float* __restrict vector{i} = c.vectors[{i}] + row;" for i in self.vectors),
            *loads,
            "    alignas(64) float result[kChannels];",
            "#pragma GCC unroll 1  // unrolled first, it is not made vectors of",
            "    for (int i = 0; i < kChannels; ++i) {",
            *body,
            "    }",
            *([f"    between({', '.join(bounds)}, result);"] if bounds else []),
            *stores,
            "  }",
        ]

    # ---- in registers ----

    @property
    def from_0(self) -> bool:
        """Whether numbers below 0 become 0 and nothing but codes is written, whose bounds then do."""
        bounds, writes = self.bounded[1], self.spec.writes
        return (
            bounds is not None
            and float(bounds[0][:-1]) == 0.0
            and not any(map(has_zero, writes))
            and all(writes)
        )

    def held(self) -> list[str]:
        """What stays in registers from pixel to pixel, and `registers<parts>(pixel, sums)`."""
        steps, result = self.steps()
        bounds = self.bounded[1]
        rows = {"factors": "c.factors"} | ({"bias": "c.bias"} if self.added else {})
        rows |= {f"vector{i}": f"c.vectors[{i}]" for i in self.vectors}
        plain = {"const int64_t n": "c.n"}  # what is stored might be the call's own, for all a compiler knows
        body = [
            f"      const Floats y0 = numbers(sums + h * kAtOnce) * factors[h]{' + bias[h]' * self.added};"
        ]
        for i, kind in enumerate(self.types):
            plain[f"const {kind}* const from{i}"] = f"static_cast<const {kind}*>(c.reads[{i}]) + row"
            given = self.read(i, f"numbers(from{i} + place + h * kAtOnce)", "each({})")
            body.append(f"      const Floats e{i} = {given};")
        body += [f"      const Floats v{i} = vector{i}[h];" for i in self.vectors]
        body += [f"      {step.replace('const float ', 'const Floats ')}" for step in steps]
        inside = f"within({result}, {', '.join(bounds)})" if bounds and not self.from_0 else result
        stores = []
        for i, f in enumerate(self.spec.writes):
            plain[f"{_type(f)}* const to{i}"] = f"static_cast<{_type(f)}*>(c.writes[{i}]) + row"
            if f is None:
                stores.append(f"    kept<parts>(result, to{i} + place);")
                continue
            plain[f"const float inverse{i}"] = f"c.inverses[{i}]"
            plain |= {f"const int32_t start{i}": f"c.starts[{i}]"} if has_zero(f) else {}
            way, more = "coded", f"start{i}, " * has_zero(f)
            if self.from_0 and bounds:
                plain[f"const float top{i}"] = f"top_of({bounds[1]}, c.inverses[{i}])"
                way, more = "coded_from_0", f"top{i}, "
            stores.append(f"    {way}<parts>(result, inverse{i}, {more}to{i} + place);")
        signs = [f"c.inverses[{i}] >= 0.0f" for i in range(len(self.spec.writes)) if self.from_0]
        plain["const bool rising"] = " && ".join(signs) or "true"  # no bound turns to the other side
        return [
            *(f"  Floats {name}[kParts];" for name in rows),
            *(f"  {name};" for name in plain),
            "  End(const Conv& c, int64_t row, int live)",
            "      : c(c), row(row), live(live)",
            *(f"      , {name.split(' ')[-1]}({value})" for name, value in plain.items()),
            "  {",
            "    for (int h = 0; h < kParts; ++h) {",
            *(f"      {name}[h] = numbers({of} + row + h * kAtOnce);" for name, of in rows.items()),
            "    }",
            "  }",
            "  template <int parts>",
            "  [[gnu::always_inline]] void registers(int64_t pixel, const int32_t* __restrict sums) const {",
            "    const int64_t place = pixel * n;",
            "    Floats result[parts];",
            "#pragma GCC unroll 2",
            "    for (int h = 0; h < parts; ++h) {",
            *body,
            f"      result[h] = {inside};",
            "    }",
            *stores,
            "  }",
        ]


def _to(i: int, f: Format | None) -> str:
    return f"static_cast<{_type(f)}*>(c.writes[{i}]) + place"


def _is_arithmetic(of: Expression) -> bool:
    return not isinstance(of, Apply) or (of.op in _ARITHMETIC and all(map(_is_arithmetic, of.operands)))


def _bounded(of: Expression) -> tuple[Expression, tuple[str, str] | None]:
    """An epilogue without the bounds that it ends with, and these: the compiler makes a long way of them."""
    if isinstance(of, Apply) and of.op == "relu":
        return of.operands[0], ("0.0f", "INFINITY")
    if isinstance(of, Apply) and of.op == "clamp":
        inner, *ends = of.operands
        if all(isinstance(end, float) and math.isfinite(end) for end in ends) and ends[0] <= ends[1]:  # type: ignore[operator]
            return inner, (f"{ends[0]!r}f", f"{ends[1]!r}f")
    return of, None


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
