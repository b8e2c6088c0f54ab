// Products of codes of up to 7 bits and signed bytes, summed in 32 bits by the vectors' own `dot`.
#pragma once
#include <cstdint>

namespace bitfold {

using Pairs = Ints;
inline Pairs pairs(Bytes codes, const int8_t* x, Pairs onto) { return dot<7>(codes, x, onto); }
inline Pairs pairs(Bytes codes, const int8_t* x) { return pairs(codes, x, no_ints()); }
// Sums for three digits, lowest first, joined: exact where the result fits, whatever passes 32 bits on the way.
inline Ints joined(Pairs a, Pairs b, Pairs c, const int32_t* onto) {
  return add(add(a, up<8>(b)), add(up<16>(c), numbers(onto)));
}

}  // namespace bitfold
