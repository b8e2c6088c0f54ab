// From a function of tensors to one that C++ of Inductor's calls by its name: handles in, handles out, an error's
// words on stderr. No dispatcher in between.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <utility>
#include <vector>

namespace bitfold {

// y: places for the first `results` of what `compute` makes of the inputs; null for one that is not wanted.
template <class F>
AOTITorchError called(const AtenTensorHandle* inputs, int64_t count, AtenTensorHandle* const* y, size_t results,
                      F&& compute) {
  try {
    std::vector<torch::stable::Tensor> given;
    given.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      AtenTensorHandle again;
      if (aoti_torch_new_tensor_handle(inputs[i], &again) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
      given.emplace_back(again);
    }
    const std::vector<torch::stable::Tensor> found = compute(std::move(given));
    for (size_t i = 0; i < std::min(results, found.size()); ++i)
      if (y[i] != nullptr && aoti_torch_new_tensor_handle(found[i].get(), y[i]) != AOTI_TORCH_SUCCESS)
        return AOTI_TORCH_FAILURE;
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace bitfold
