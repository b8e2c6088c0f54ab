// Kernels that an operator knows, by their texts; one that it does not know is built when it is called.
#pragma once
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace bitfold {

// Makes a kernel known; null, or why none is to be had, which stays until the thread asks again.
using Build = const char* (*)(const char* text);

// Facts: what a spec says, in numbers; a type of the operator's own.
template <class Facts> class Known {
 public:
  void builder(Build build) { build_ = build; }
  void put(const char* text, const Facts& facts) {
    std::unique_lock<std::shared_mutex> lock(guard_);
    known_[text] = facts;
  }
  Facts of(const std::string& text) const {
    Facts found;
    if (find(text, found)) return found;
    const char* why = build_ == nullptr ? "nothing here builds kernels" : build_(text.c_str());
    if (why != nullptr) throw std::runtime_error(why);
    if (!find(text, found)) throw std::runtime_error("no kernel was built for " + text);
    return found;
  }

 private:
  bool find(const std::string& text, Facts& found) const {
    std::shared_lock<std::shared_mutex> lock(guard_);
    const auto at = known_.find(text);
    if (at == known_.end()) return false;
    found = at->second;
    return true;
  }

  mutable std::shared_mutex guard_;
  std::unordered_map<std::string, Facts> known_;
  Build build_ = nullptr;
};

}  // namespace bitfold

// What Python calls of an operator, the file of that name, that has a `known` of its own (known.py).
#define BITFOLD_KNOWN(name, Facts)                                                              \
  extern "C" void bitfold_builder_##name(bitfold::Build made) { bitfold::known.builder(made); } \
  extern "C" int64_t bitfold_size_of_facts_##name() { return sizeof(Facts); }                   \
  extern "C" void bitfold_know_##name(const char* text, const Facts* facts) { bitfold::known.put(text, *facts); }
