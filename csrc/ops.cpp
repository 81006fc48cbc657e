// Every op of fastdiff: its schema, one line each, and what is asked of the library itself. No arithmetic, no Python.
// What the arguments mean stands in fastdiff/ops/<op>.py.

#include <string>

#include "cpu/capability.h"
#include "tensors.h"

STABLE_TORCH_LIBRARY(fastdiff, m) {
  m.def("sampler_step(Tensor model_output, Tensor x_t, Tensor? noise, float c_out, float c_xt, float c_noise, bool normalize) -> Tensor");
}

// --- questions to the library, for ctypes: they take and give no tensors ---------------------------------------------

#define FASTDIFF_EXPORT extern "C" __attribute__((visibility("default")))

FASTDIFF_EXPORT const char* fastdiff_cpu_capability() { return fastdiff::level_name(fastdiff::level()); }

FASTDIFF_EXPORT const char* fastdiff_cpu_highest() { return fastdiff::level_name(fastdiff::highest_level()); }

// An empty name is the highest level. Returns what is wrong, or null.
FASTDIFF_EXPORT const char* fastdiff_set_cpu_capability(const char* name) {
  static thread_local std::string wrong;
  try {
    fastdiff::set_level(name);
    return nullptr;
  } catch (const std::exception& error) {
    wrong = error.what();
    return wrong.c_str();
  }
}
