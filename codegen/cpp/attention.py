"""From an `AttentionSpec` to the C++ source that reads its cache: a token's codes to floats, keys and values.

In: a spec. Out: the text of a file with one `attend(call, first, last)`, for heads first .. last - 1 of the
cache, numbered entry by entry. What is done with the floats is `headers/attention.h`'s, the same for all.

    attention 9/3x64 f32 int8[bf16,halves128] int4[g32,halves128]
    ->  for each 64 units of 16 bits: numbers of bits 0-7, then of bits 8-15, less the zero point, times the
        token's scale

Codes are taken out as the walk over the layout says (`codegen/slices.py`), by loops that a compiler turns
into vectors for any processor. Integers are converted; other elements are looked up in a table of values.
"""

from __future__ import annotations

from ...formats import Format, Integer
from ..attention import AttentionSpec, group_of, grouped, groups, has_zero, row
from ..slices import Take
from .values import number

# Codes of a loop: GCC makes straight vector code of sixteen, and a slow loop of more.
PIECE = 16
# Stored types of scales, zero points and x, as `headers/numbers.h` calls them.
_ZEROS = {True: "i8", False: "u8"}


def source(spec: AttentionSpec) -> str:
    """The kernel's file as text."""
    places = dict(zip(spec.parts, range(len(spec.parts)), strict=True))
    lines = [
        f"// {spec}",
        "#include <algorithm>",
        '#include "kernel.h"',
        "#include VECTORS",
        '#include "numbers.h"',
        '#include "attention.h"',
        "",
        "namespace bitfold {",
        "namespace {",
        "",
        *_side("Keys", "k", spec.k, spec, places),
        *_side("Values", "v", spec.v, spec, places),
        "}  // namespace",
        "}  // namespace bitfold",
        "",
        'extern "C" void attend(const bitfold::Attention* call, int64_t first, int64_t last) {',
        "  using namespace bitfold;",
        f"  attend<{spec.x}>(call->queries, Keys{{call->cache}}, Values{{call->cache}}, first, last);",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _side(name: str, which: str, fmt: Format, spec: AttentionSpec, places: dict[str, int]) -> list[str]:
    """The class of keys or of values."""
    walked = row(fmt, spec.dim)
    units = walked.units * walked.runs
    return [
        *_table(which, fmt),
        f"struct {name} {{",
        "  const Cache& cache;",
        "  const float* row(int64_t entry, int64_t head, int64_t token, float* room) const {",
        "    int64_t block = entry, at = token;",
        "    if (cache.page) block = cache.pages.get(entry, token / cache.page), at = token % cache.page;",
        f"    const int64_t line = block * {spec.kv_heads} + head, one = line * cache.length + at;",
        f"    const uint16_t* units = static_cast<const uint16_t*>(cache.parts[{places[which + '_codes']}])"
        f" + one * {units};",
        *_parameters(which, fmt, spec.dim, places),
        *_slices(which, fmt, spec.dim),
        "    return room;",
        "  }",
        "};",
        "",
    ]


def _table(which: str, fmt: Format) -> list[str]:
    """The values of an element that no conversion gives."""
    if isinstance(fmt.element, Integer):
        return []
    numbers = ", ".join(number(value) for value in fmt.element.values())
    return [f"const float k_{which}[{len(fmt.element.values())}] = {{{numbers}}};"]


def _parameters(which: str, fmt: Format, dim: int, places: dict[str, int]) -> list[str]:
    """Scales and zero points of a token, one for each of its groups."""
    if fmt.scale is None:
        return []
    count, by_group = groups(fmt, dim), fmt.scale.granularity.cols is not None
    kinds = [("scale", places[f"{which}_scales"], fmt.scale.dtype)]
    if has_zero(fmt):
        assert isinstance(fmt.element, Integer)
        kinds.append(("zero", places[f"{which}_zeros"], _ZEROS[fmt.element.signed]))
    lines = []
    for name, part, kind in kinds:
        for group in range(count):
            at = f"(line * {count} + {group}) * cache.length + at" if by_group else "one"
            at = at if grouped(fmt) else "head"
            lines.append(f"    const float {name}{group} = {kind}::get(cache.parts[{part}], {at});")
    return lines


def _slices(which: str, fmt: Format, dim: int) -> list[str]:
    """A loop for each stretch of codes that one shift and one mask take out."""
    walked = row(fmt, dim)
    lines = []
    for run in range(walked.runs):
        for i, takes in enumerate(walked.slices):
            first = run * walked.codes + i * walked.length
            if first >= dim:
                continue
            group = group_of(fmt, first) if grouped(fmt) else 0
            value = _value(which, fmt, "code")
            value = f"({value} - zero{group})" if has_zero(fmt) else value
            value = f"{value} * scale{group}" if fmt.scale is not None else value
            code = " | ".join(_taken(take, run * walked.units + walked.loads[take.load]) for take in takes)
            for start in range(0, walked.length, PIECE):
                lines += [
                    f"    for (int i = {start}; i < {start + PIECE}; ++i) {{",
                    f"      const uint32_t code = {code};",
                    f"      room[{first} + i] = {value};",
                    "    }",
                ]
    return lines


def _taken(take: Take, load: int) -> str:
    """Some bits of a code, where they belong in it."""
    shifted = f"uint32_t(units[{load} + i]) >> {take.bit}" if take.bit else f"uint32_t(units[{load} + i])"
    masked = f"({shifted} & {(1 << take.width) - 1})"
    return f"({masked} << {take.low})" if take.low else masked


def _value(which: str, fmt: Format, code: str) -> str:
    """A code's number before it is scaled."""
    element = fmt.element
    if not isinstance(element, Integer):
        return f"k_{which}[{code}]"
    whole = f"int32_t({code})"
    if element.signed:
        whole = f"(int32_t({code} << {32 - element.bits}) >> {32 - element.bits})"
    return f"float({whole}) * {2.0**-element.fraction!r}f" if element.fraction else f"float({whole})"
