// One kernel, compiled once per instruction set. A kernel's header declares it for every level that its file names in
// its first line (`// levels: ...`):
//
//     FASTDIFF_KERNEL(void, sampler_step, (const SamplerStepArgs&))      // baseline, avx2, avx512
//
// and calls the best one that may run with FASTDIFF_PICK(sampler_step)(args). The kernel's file is compiled with
// -DFASTDIFF_LEVEL=<level> and that level's instruction sets, and defines the function in fastdiff::FASTDIFF_LEVEL.
//
// Such a file must not instantiate templates or inline functions that other files share (the standard library's
// containers and algorithms): the linker keeps one copy of each, and it may be the one with AVX-512 in it.
#pragma once

#include "capability.h"

// The levels that a build for this architecture has.
#if defined(__x86_64__)
#define FASTDIFF_KERNEL(result, name, arguments)   \
  namespace baseline { result name arguments; }    \
  namespace avx2 { result name arguments; }        \
  namespace avx512 { result name arguments; }
#define FASTDIFF_PICK(name) \
  (::fastdiff::pick(&::fastdiff::baseline::name, &::fastdiff::avx2::name, &::fastdiff::avx512::name))
#define FASTDIFF_KERNEL_ALL(result, name, arguments) \
  FASTDIFF_KERNEL(result, name, arguments)           \
  namespace avx512_vnni { result name arguments; }   \
  namespace avx512_bf16 { result name arguments; }   \
  namespace amx { result name arguments; }
#define FASTDIFF_PICK_ALL(name)                                                                            \
  (::fastdiff::pick(&::fastdiff::baseline::name, &::fastdiff::avx2::name, &::fastdiff::avx512::name,       \
                    &::fastdiff::avx512_vnni::name, &::fastdiff::avx512_bf16::name, &::fastdiff::amx::name))
#else
#define FASTDIFF_KERNEL(result, name, arguments) \
  namespace baseline { result name arguments; }
#define FASTDIFF_PICK(name) (&::fastdiff::baseline::name)
#define FASTDIFF_KERNEL_ALL(result, name, arguments) FASTDIFF_KERNEL(result, name, arguments)
#define FASTDIFF_PICK_ALL(name) FASTDIFF_PICK(name)
#endif

namespace fastdiff {

// The last of the functions, one per level from baseline up, that the level in use allows.
template <class Function, class... Others>
Function* pick(Function* first, Others*... others) {
  Function* const functions[] = {first, others...};
  const int highest = static_cast<int>(sizeof...(Others));
  const int wanted = static_cast<int>(level());
  return functions[wanted < highest ? wanted : highest];
}

}  // namespace fastdiff
