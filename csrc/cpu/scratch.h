// Working memory of a task: the thread's own, aligned to 64 bytes, kept for the next task, so that a kernel neither
// allocates nor touches fresh pages.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastdiff {

// `floats` uninitialised floats, this thread's until its next call of scratch().
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    const int64_t rounded = (floats + 1023) / 1024 * 1024;
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(rounded) * sizeof(float))));
    if (memory == nullptr) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

}  // namespace fastdiff
