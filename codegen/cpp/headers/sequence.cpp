// Calls functions that Inductor wrote, one after the other, with no Python in between.
//
// A function takes tensors' handles, which become its own, and leaves those of its results; it gives the
// interpreter's lock back while it runs, so this one is called with it.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <vector>

namespace {

using Entry = void (*)(AtenTensorHandle*, AtenTensorHandle*);

// Handles that are freed with it.
struct Values {
  std::vector<AtenTensorHandle> at;
  ~Values() {
    for (AtenTensorHandle one : at)
      if (one != nullptr) aoti_torch_delete_tensor_object(one);
  }
  AtenTensorHandle again(int64_t i) const {
    AtenTensorHandle made;
    if (at[i] == nullptr) throw std::runtime_error("a step made no handle of a tensor");
    if (aoti_torch_new_tensor_handle(at[i], &made) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("no memory for a tensor's handle");
    return made;
  }
  AtenTensorHandle taken(int64_t i) {
    const AtenTensorHandle one = at[i];
    at[i] = nullptr;
    return one;
  }
};

}  // namespace

// handles: a list of capsules, which become ours. plan: values in all, steps, results; for each step its function, how
// many it takes and makes, which values it takes, i or, for the last time, -1 - i, and which it makes; then the
// results. Returns the results' capsules.
extern "C" PyObject* bitfold_sequence(const int64_t* plan, PyObject* handles) {
  const int64_t count = *plan++, steps = *plan++, results = *plan++;
  Values values;
  values.at.assign(count, nullptr);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(handles); ++i)
    values.at[i] = static_cast<AtenTensorHandle>(PyCapsule_GetPointer(PyList_GET_ITEM(handles, i), nullptr));
  PyObject* found = nullptr;
  try {
    std::vector<AtenTensorHandle> given, made;
    for (int64_t step = 0; step < steps; ++step) {
      const Entry entry = reinterpret_cast<Entry>(*plan++);
      const int64_t takes = *plan++, makes = *plan++;
      given.clear(), made.assign(makes, nullptr);
      for (int64_t i = 0; i < takes; ++i, ++plan)
        given.push_back(*plan < 0 ? values.taken(-1 - *plan) : values.again(*plan));
      entry(given.data(), made.data());
      for (int64_t i = 0; i < makes; ++i) values.at[*plan++] = made[i];
    }
    found = PyList_New(results);
    for (int64_t i = 0; i < results; ++i)
      PyList_SET_ITEM(found, i, PyCapsule_New(values.again(plan[i]), nullptr, nullptr));
  } catch (const std::exception& error) {
    Py_XDECREF(found);
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return found;
}
