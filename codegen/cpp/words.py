"""8-bit integers times one row of float x, in sums of integers: x is two words of 15 bits.

In: a `Body` whose weights are signed bytes as they lie. Out: lines of C++ for `digits.py`.

    x of a block, 1024 numbers  ->   30-bit integers and a power of two (`headers/digits.h`), as two int16
    for each block:  bytes widened to 16 bits, times each word, summed by pairs in 32 (`vpmaddwd`)
                     then a float of each sum

A float for each byte costs AVX2 three instructions for 8 weights, with a shuffle; this, five for 16.
Sums of a block are exact: it is x alone that is rounded, to 2**-29 of a block's largest number. A block may
be long, and numbers of x far apart, before that is more than what sums in float32 lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ...formats import Integer
from .body import Body
from .products import opened

LARGEST = 1024  # numbers to a block
LEAST = 128  # below, the end of a block costs what floats do
STEP = 16  # bytes that are widened together, in any vectors: `headers/words.h`


@dataclass(frozen=True)
class Words:
    """block: numbers of x that share a power of two; the last of a row may be shorter."""

    block: int
    base: int = 0
    unit: float = 1.0


@lru_cache(maxsize=512)
def words(body: Body) -> Words | None:
    """How a kernel multiplies words, or None where it does not."""
    element, walk = body.spec.weight.element, body.walk
    whole = len(walk.slices) == 1 and tuple(walk.loads) == (0,) and walk.length == walk.codes
    if body.by_integers or not isinstance(element, Integer) or element.bits != 8:
        return None
    if body.decode.bytes != "b0" or not whole or walk.codes % 32:
        return None
    if body.cols is None:
        return Words(LARGEST, unit=body.decode.factor)
    fits = [n for n in range(LEAST, LARGEST + 1, walk.codes) if body.cols % n == 0]
    return Words(max(fits), unit=body.decode.factor) if fits else None


def row(body: Body, made: Words) -> list[str]:
    """`of_digits`: a row of the weight times x in words, but for x's and the codes' units."""
    scale = "" if body.cols is None else f" * s[0][(b - k0) / {body.cols}]"
    whole = ["  {", "    const int64_t k0 = 0, until = call.k;"]
    if body.cols is not None:
        whole = [
            "  for (int64_t k0 = 0; k0 < call.k; k0 += kBlock) {",
            "    const int64_t until = std::min<int64_t>(k0 + kBlock, call.k);",
            *opened(body),
        ]
    return [
        f"constexpr int kBlockOfX = {made.block};",
        *_run(body),
        "// A row of the weight times x in words, but for x's and the codes' units.",
        "inline Sums of_digits(const Call& call, const Weight& w, int64_t row, float& added) {",
        "  [[maybe_unused]] constexpr int R = 1, M = 1;",
        "  [[maybe_unused]] constexpr int64_t m0 = 0;",
        "  [[maybe_unused]] const int64_t base[R] = {scales_of(call, row)};",
        "  const uint8_t* u = w.codes + row * call.stride;",
        "  const int16_t* x = reinterpret_cast<const int16_t*>(call.digits);",
        "  const float* steps = call.steps;",
        "  Sums total = no_sums();",
        "  float rest[R][M] = {};",
        *whole,
        "    for (int64_t b = k0; b < until; b += kBlockOfX) {",
        "      const int64_t end = std::min<int64_t>(b + kBlockOfX, until);",
        "      Ints high = no_ints(), low = no_ints();",
        "      int64_t k = b;",
        "#pragma GCC unroll 2",
        "      for (; k + kCodes <= end; k += kCodes, u += kCodes, x += 2 * kCodes)",
        "        run_of_words(u, x, high, low);",
        "      if (k < end) {  // what follows is the next row, or no memory",
        "        uint8_t last[kCodes] = {};",
        "        std::memcpy(last, u, end - k);",
        "        run_of_words(last, x, high, low);",
        "      }",
        f"      const float f = *steps++{scale};",
        "      total = scaled(high, f * 32768.0f, total);",
        "      total = scaled(low, f, total);",
        "    }",
        "  }",
        "  added = rest[0][0];",
        "  return total;",
        "}",
        "",
    ]


def _run(body: Body) -> list[str]:
    """The products of a run of codes. A function of its own, so that the loop over whole runs calls nothing:
    beside a call the compiler keeps sums in memory."""
    lines = [
        "inline void run_of_words(const uint8_t* u, const int16_t* x, Ints& high, Ints& low) {",
    ]
    for first in range(0, body.walk.codes, STEP):
        place = 2 * first
        lines += [
            f"  const Words c{first} = words(u + {first});",
            f"  high = products(c{first}, x + {place}, high);",
            f"  low = products(c{first}, x + {place + STEP}, low);",
        ]
    return [*lines, "}", ""]
