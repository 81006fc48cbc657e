// What a thread does between two looks at a value that another thread will change.
#pragma once

namespace fastdiff {

__attribute__((always_inline)) inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace fastdiff
