// The pybind11 module fastdiff._C: how this build was made, what the CPU of this machine can do, and the packing of
// histories (python/histories.cpp). Built without torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "python/histories.h"

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define FASTDIFF_X86 1
#else
#define FASTDIFF_X86 0
#endif

#if FASTDIFF_X86 && defined(__GNUC__)  // GCC and Clang
#include <cpuid.h>
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " + std::string(__clang_version__);
#elif defined(__GNUC__)
  return "gcc " + std::string(__VERSION__);
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// MSVC leaves __cplusplus at 1997 unless told otherwise.
long cxx_standard() {
#if defined(_MSVC_LANG)
  return _MSVC_LANG;
#else
  return __cplusplus;
#endif
}

// The instruction sets that the compiler was allowed to use everywhere; the baseline unless someone set CXXFLAGS.
std::string baseline() {
#if defined(__AVX512F__)
  return "x86-64 with AVX-512";
#elif defined(__AVX2__)
  return "x86-64 with AVX2";
#elif defined(__x86_64__) || defined(_M_X64)
  return "x86-64";
#elif defined(__aarch64__) || defined(_M_ARM64)
  return "aarch64";
#else
  return "other";
#endif
}

std::map<std::string, std::string> build_facts() {
#if defined(__OPTIMIZE__) || (defined(_MSC_VER) && defined(NDEBUG))
  const char* optimized = "yes";
#else
  const char* optimized = "no";
#endif
#if defined(_OPENMP)
  const std::string openmp = std::to_string(_OPENMP);
#else
  const std::string openmp = "no";
#endif
  return {
      {"compiler", compiler()},
      {"cxx_standard", std::to_string(cxx_standard() / 100 % 100)},
      {"optimized", optimized},
      {"baseline", baseline()},
      {"openmp", openmp},
      {"python", PY_VERSION},
      {"pybind11", std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR)},
  };
}

#if FASTDIFF_X86 && defined(__GNUC__)
// Leaf 7, subleaf 1, EAX bit 5. Older compilers do not know the name in __builtin_cpu_supports.
bool cpuid_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && ((eax >> 5) & 1u) != 0;
}
#endif

// What both the CPU and the operating system allow. Empty where this compiler gives no way to ask.
std::map<std::string, bool> cpu_capabilities() {
#if FASTDIFF_X86 && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx512f = __builtin_cpu_supports("avx512f") != 0;
  return {
      {"avx2", __builtin_cpu_supports("avx2") != 0},
      {"fma", __builtin_cpu_supports("fma") != 0},
      {"avx512f", avx512f},
      {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
      {"avx512_bf16", avx512f && cpuid_avx512_bf16()},
      {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
  };
#elif FASTDIFF_X86
  return {};
#else
  return {
      {"avx2", false},     {"fma", false},         {"avx512f", false},
      {"avx512bw", false}, {"avx512_bf16", false}, {"avx512_vnni", false},
  };
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "How this build of fastdiff was made, what the CPU of this machine can do, the packing of histories.";
  module.def("build_facts", &build_facts, "dict[str, str]: compiler, C++ standard and options of this build.");
  module.def("cpu_capabilities", &cpu_capabilities,
             "dict[str, bool]: instruction sets usable here, asked at run time; empty where that cannot be asked.");
  fastdiff::bind_item_index(module);
}
