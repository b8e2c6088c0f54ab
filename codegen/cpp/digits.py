"""Small integers times one row of float x, in sums of integers: x is three digits of 8 bits.

In: a `Body` whose weights are integers of up to 7 bits, or small multiples of one unit. Out: lines of C++.

    x of a block, 64 numbers    ->   24-bit integers and a power of two (`headers/digits.h`), as three int8
    for each block:  codes, unsigned, times each digit, summed in 16 bits (`vpmaddubsw`, `vpaddw`)
                     the three sums joined in 32 bits, exactly, less what codes are too high; then a float

A float for each weight costs AVX2 four instructions for 8 weights; this, 27 for 64 of int4, and 20 where
groups lie side by side, the block's end included. All sums of a block are exact: it is x alone that is
rounded, to 2**-23 of a block's largest number.

    |error| <= 2**-23 sum over blocks (max |x|) (sum |w|), and blocks are added up in float32

A row whose blocks hold numbers of very different sizes, or no finite ones, goes the way of floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ...formats import Integer
from ..byte_lanes import all_bytes
from ..lanes import AND_OR, Constant, Program
from ..slices import Take, Walk, renumbered
from .body import Body
from .products import CHUNK, last, opened, place, tail
from .values import expression, multiples
from .words import Words, words
from .words import row as row_of_words

MOST = 127 << 16 | 127 << 8 | 127  # of |x|, as an integer that three digits hold
LARGEST = 128  # numbers to a block: x is rounded to its largest
LANES16, LANES32 = 16, 8  # sums of a vector of 32 bytes


@dataclass(frozen=True)
class Digits:
    """block: numbers of x that share a power of two; joined: codes whose sums are joined at once, those of
    a block, or of eight groups side by side; base: how much more than the multiple of `unit` a code is; high:
    the largest code; table: what codes become by a look-up first, if anything."""

    block: int
    joined: int
    base: int
    high: int
    unit: float
    table: tuple[int, ...] = ()


@lru_cache(maxsize=512)
def digits(body: Body) -> Digits | None:
    """How a kernel multiplies digits, or None where it does not."""
    element, walk = body.spec.weight.element, body.walk
    if body.by_integers or element.bits == 8 or walk.length % CHUNK:
        return None
    table: tuple[int, ...] = ()
    if isinstance(element, Integer):
        base, high = 1 << (element.bits - 1), (1 << element.bits) - 1
        unit = body.unit
    else:
        found = multiples(element)
        if found is None:
            return None
        unit, whole = found
        base = -min(whole)
        table = tuple(v + base for v in whole)
        high = max(table)
    reach = max(base, high - base)
    # What a sum of n products for each digit holds at most, in 16 bits and joined in 32.
    most = min(
        (2**15 - 1) // (CHUNK // LANES16 * high * 128),
        (2**31 - 1) // (CHUNK // LANES32 * reach * MOST),
    )
    sizes = {len(slices) * walk.length for _, slices in body.stretches()}
    if len(sizes) != 1 or most == 0:
        return None
    chunks = sizes.pop() // CHUNK
    if body.span is not None:
        joined = CHUNK * max(n for n in range(1, most + 1) if chunks % n == 0)
        return Digits(body.span // LANES32, joined, base, high, unit, table)
    block = CHUNK * max(n for n in range(1, min(most, LARGEST // CHUNK) + 1) if chunks % n == 0)
    return Digits(block, block, base, high, unit, table)


def alone(body: Body) -> Digits | Words | None:
    """How one row of x is multiplied as integers, or None where it is as floats."""
    return digits(body) or words(body)


def by_digits(body: Body) -> list[str]:
    """`by_digits<R>`: R rows of the weight times one row of x; nothing where digits are not multiplied."""
    made = alone(body)
    if made is None:
        return []
    many = body.spec.weights
    whole = ["    float s, z;", "    scales(w, scales_of(call, row + r), s, z);"] if body.whole_rows else []
    return [
        *(row_of_words(body, made) if isinstance(made, Words) else _row(body, made)),
        "template <int R>",
        "inline void by_digits(const Call& call, int64_t row) {",
        f"  float sums[{many}][R][1];",
        f"  for (int i = 0; i < {many}; ++i) {{",
        "    const Weight& w = call.weights[i];",
        "    Sums total[R];",
        "    float rest[R], across[R];",
        *_each(body, made),
        "    added_up<R>(total, across);",
        "    for (int r = 0; r < R; ++r) {",
        *(f"  {line}" for line in whole),
        f"      const float unit = {_ratio(body, made)}{' * s' if whole else ''};",
        "      sums[i][r][0] = across[r] * unit * call.x_unit + rest[r];",
        "    }",
        "  }",
        "  finish<R, 1>(call, row, 0, sums);",
        "}",
        "",
    ]


def _ratio(body: Body, made: Digits | Words) -> str:
    """A unit of integers in units of what scales are made for."""
    held = " / kHeld" if body.held else ""
    return f"({made.unit / body.decode.factor!r}f{held})"


def _each(body: Body, made: Digits | Words) -> list[str]:
    """The sums of R rows. Together where their scales are turned into floats at once: what does not depend on
    a row is done once, 20 % of the instructions of a row of 576. A longer row is one stream of memory to its
    end. With zero points, whose sums need as many registers again, it was slower."""
    alone = "    for (int r = 0; r < R; ++r) "
    if isinstance(made, Words):
        return [f"{alone}total[r] = of_digits(call, w, row + r, rest[r]);"]
    one = f"{alone}of_digits<1>(call, w, row + r, total + r, rest + r);"
    if body.cols is None or body.needs_sums:
        return [one]
    return [
        "    if (call.k <= kBlock)",
        "      of_digits<R>(call, w, row, total, rest);",
        "    else",
        f"  {one}",
    ]


def _row(body: Body, made: Digits) -> list[str]:
    table = ", ".join(map(str, [*made.table, *[0] * (16 - len(made.table))]))
    blocks = body.walk.codes // made.joined
    grouped = body.cols is not None
    lines = [
        f"constexpr int kDigits = {made.block}, kJoined = {made.joined};",
        *([f"alignas(16) constexpr int8_t kSmall[16] = {{{table}}};"] if made.table else []),
        "// R rows of the weight times x in digits, but for x's and the codes' units.",
        "template <int R>",
        "inline void of_digits(const Call& call, const Weight& w, int64_t row, Sums* total, float* added) {",
        "  constexpr int M = 1;",
        "  constexpr int64_t m0 = 0;",
        "  const int64_t stride = call.stride;",
        "  const uint8_t* const codes_of_row = w.codes + row * stride;",
        "  [[maybe_unused]] int64_t base[R];",
        "  float rest[R][M] = {};",
        "  for (int r = 0; r < R; ++r) base[r] = scales_of(call, row + r), total[r] = no_sums();",
        *tail(body),
        f"  for (int64_t k0 = 0; k0 < call.k; k0 += {'kBlock' if grouped else 'call.k'}) {{",
        f"    const int64_t end = {last(body) if grouped else 'call.k'};",
    ]
    if grouped:
        lines += [
            *opened(body),
            "    alignas(64) float both[R][kBlock / kDigits + kFloats];",
            "    const int64_t blocks = std::min<int64_t>(kBlock, call.padded - k0) / kDigits;",
            "    const float* const steps = call.steps + k0 / kDigits;",
            "    for (int r = 0; r < R; ++r)",
            *_both(body, made),
        ]
    # Sums of their own here: what lives as long as the row, the compiler keeps in memory.
    unrolled = ["#pragma GCC unroll 4"] if body.walk.codes <= 128 else []
    lines += [
        "    for (int r = 0; r < R; ++r) {",
        "      const int8_t* x = call.digits + k0 * 3;",
        f"      const int32_t* middles = call.middles + k0 / kJoined * {LANES32};",
        f"      const float* f = {'both[r]' if grouped else 'call.steps'};",
        "      Sums near[2] = {no_sums(), no_sums()};",
        "      int64_t at = k0 / kCodes * kUnits;",
        *unrolled,
        *_runs(body),
        f"        const uint8_t* const bytes = {place(body)};",
        *(f"  {line}" for line in _loaded(body)),
    ]
    for block in range(blocks):
        lines += ["        {"]
        for i in range(made.joined // CHUNK):
            lines += [
                f"          {line}" for line in _chunk(body, made, block * made.joined + i * CHUNK, i == 0)
            ]
        scale = f"f[{block}]" if body.span is None else "of_groups"
        lines += [
            f"          const Ints all = joined(p0, p1, p2, middles + {block * LANES32});",
            f"          near[{block % 2}] = scaled(all, {scale}, near[{block % 2}]);",
            "        }",
        ]
    each = f", f += {blocks}" if body.span is None else ""
    return [
        *lines,
        f"        x += 3 * kCodes, middles += {blocks * LANES32}{each};",
        "      }" if body.span is None else "      }}",
        "      total[r] = scaled(near[1], 1.0f, scaled(near[0], 1.0f, total[r]));",
        "    }",
        "  }",
        "  for (int r = 0; r < R; ++r) added[r] = rest[r][0];",
        "}",
        "",
    ]


def _runs(body: Body) -> list[str]:
    """The loop over a block's runs; where groups lie side by side, of spans, whose scales are a vector."""
    if body.span is None:
        return ["      for (int64_t k = k0; k < end; k += kCodes, at += kUnits) {"]
    return [
        "      for (int64_t k = k0; k < end; k += kSpan, f += kGroups) {",
        "        const Floats of_groups = loadf(f);",
        "      for (int i = 0; i < kSpan / kCodes; ++i, at += kUnits) {",
    ]


def _both(body: Body, made: Digits) -> list[str]:
    """Scales of the weight times steps of x, for each block; in vectors without an end of their own."""
    if body.cols == made.block:
        return [
            "      for (int64_t i = 0; i < blocks; i += kFloats)",
            "        storef(both[r] + i, mul(loadf(s[r] + i), loadf(steps + i)));",
        ]
    return [
        f"      for (int64_t i = 0; i < blocks; ++i) both[r][i] = s[r][i * kDigits / {body.cols}] * steps[i];"
    ]


def _loaded(body: Body) -> list[str]:
    """A run's bytes as they are loaded; a signed integer's top bit the other way round, so that codes rise
    with the integers: once for all the codes of a byte."""
    return [
        f"      const Bytes {_name(load, v)} = {_flipped(body, load, f'load32(bytes + {start + v})')};"
        for load, start in enumerate(body.walk.loads)
        for v in range(0, body.walk.length, CHUNK)
    ]


def _flipped(body: Body, load: int, loaded: str) -> str:
    element, walk = body.spec.weight.element, body.walk
    flip = _top_bits(walk, load, element.bits) if isinstance(element, Integer) and element.signed else 0
    return f"xor_({loaded}, all(0x{flip:02X}))" if flip else loaded


def _top_bits(walk: Walk, load: int, bits: int) -> int:
    found = 0
    for takes in walk.slices:
        for take in takes:
            if take.load == load and take.low + take.width == bits:
                found |= 1 << (take.bit + take.width - 1)
    return found


def _name(load: int, v: int) -> str:
    return f"l{load}_{v}"


def _above(body: Body, made: Digits, i: int, v: int) -> int | None:
    """The slice, if any, whose codes lie four bits above those of slice i, both in several pieces: they are
    brought together at once, if codes v .. of both are added up together."""
    slices, length = body.walk.slices, body.walk.length
    takes = slices[i]
    if len(takes) == 1 or any(take.low + take.width > 4 for take in takes):
        return None
    above = tuple(replace(take, bit=take.bit + 4) for take in takes)
    block = (i * length + v) // made.joined
    beside = [j for j in range(i + 1, len(slices)) if (j * length + v) // made.joined == block]
    return next((j for j in beside if slices[j] == above), None)


def _taken(takes: Sequence[Take], v: int, times: int) -> str:
    """Codes in the low bits of their bytes, or (times: 0x11) of both halves."""
    ((renamed,), read) = renumbered([takes])
    program = Program(len(read))
    value: int | Constant = Constant(0)
    for take in renamed:
        shifted = program.shift(take.load, take.low - take.bit)
        mask = all_bytes((((1 << take.width) - 1) << take.low) * times)
        value = program.logic(shifted, mask, value, AND_OR)
    assert isinstance(value, int)
    codes = expression(program, value)
    for at in reversed(range(len(read))):  # b1 before b0: no name is in another
        codes = codes.replace(f"b{at}", _name(read[at], v))
    return codes


def _chunk(body: Body, made: Digits, first: int, opens: bool) -> list[str]:
    """The products of codes first .. first + 31 of a run."""
    i, v = divmod(first, body.walk.length)
    slices, element = body.walk.slices, body.spec.weight.element
    lines = []
    if (other := _above(body, made, i, v)) is not None:  # this one's, and those of another beside
        lines.append(f"const Bytes both{other}_{v} = {_taken(slices[i], v, 0x11)};")
        codes = f"and_(both{other}_{v}, all({(1 << element.bits) - 1}))"
    elif any(_above(body, made, below, v) == i for below in range(i)):
        codes = f"and_(shr<4>(both{i}_{v}), all({(1 << element.bits) - 1}))"
    else:
        codes = _taken(slices[i], v, 1)
    if made.table:
        codes = f"look_up(kSmall, {codes})"
    lines.append(f"const Bytes c{first} = {codes};")
    for digit in range(3):
        onto = "" if opens else f", p{digit}"
        kept = "Pairs " if opens else ""
        lines.append(f"{kept}p{digit} = pairs(c{first}, x + {3 * first + CHUNK * digit}{onto});")
    return lines
