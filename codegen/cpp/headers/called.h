// From a function of tensors to one that C++ of Inductor's calls by its name: handles in, handles out, no dispatcher in
// between.
//
// What is refused is thrown through the C function: Inductor's code, which is C++, throws at an error's code too, where
// all that its exception says is that a call failed.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "refuse.h"

namespace bitfold {

// A tensor that its caller keeps.
inline torch::stable::Tensor again(AtenTensorHandle given) {
  AtenTensorHandle handle;
  require(aoti_torch_new_tensor_handle(given, &handle) == AOTI_TORCH_SUCCESS, "no handle of a tensor");
  return torch::stable::Tensor(handle);
}

// y: a place for it; null if it is not wanted.
inline void hand_out(const torch::stable::Tensor& found, AtenTensorHandle* y) {
  if (y == nullptr) return;
  require(aoti_torch_new_tensor_handle(found.get(), y) == AOTI_TORCH_SUCCESS, "no handle of a result");
}

// y: places for the first `results` of what `compute` makes of the inputs.
template <class F>
AOTITorchError called(const AtenTensorHandle* inputs, int64_t count, AtenTensorHandle* const* y, size_t results,
                      F&& compute) {
  std::vector<torch::stable::Tensor> given;
  given.reserve(count);
  for (int64_t i = 0; i < count; ++i) given.push_back(again(inputs[i]));
  const std::vector<torch::stable::Tensor> found = compute(std::move(given));
  for (size_t i = 0; i < std::min(results, found.size()); ++i) hand_out(found[i], y[i]);
  return AOTI_TORCH_SUCCESS;
}

}  // namespace bitfold
