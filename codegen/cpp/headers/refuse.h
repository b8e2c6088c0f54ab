// A refusal: one sentence, as the exception that torch makes a RuntimeError of.
//
//   require(x.dim() == 4, "attention takes q of four dimensions, not ", x.dim());
//
// Not by torch's STD_TORCH_CHECK, which begins with the function, the file and the line, and which writes into a
// stream: where a compiler links the standard library into each library, a stream's locale is that of another copy, and
// the process dies instead of saying why.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

namespace bitfold {

template <class T> std::string word(const T& part) {
  if constexpr (std::is_arithmetic_v<T>)
    return std::to_string(part);
  else
    return std::string(part);
}

template <class... Parts> inline void require(bool right, const Parts&... parts) {
  if (__builtin_expect(!right, 0)) throw std::runtime_error((std::string() + ... + word(parts)));
}

}  // namespace bitfold
