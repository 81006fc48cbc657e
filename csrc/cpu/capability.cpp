#include "capability.h"

#include <atomic>
#include <cstdlib>

#include "../check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdiff {
namespace {

constexpr const char* kNames[kLevels] = {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

#if defined(__x86_64__)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
  }
};

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// Linux hands out the tile registers only to processes that ask for them.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Level ask() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Level::avx2;
  const Cpuid seven(7, 0), seven_one(7, 1);
  if (!bit(seven.ecx, 11)) return Level::avx512;        // AVX512_VNNI
  if (!bit(seven_one.eax, 5)) return Level::avx512_vnni;  // AVX512_BF16
  const bool amx = bit(seven.edx, 24) && bit(seven.edx, 22) && bit(seven.edx, 25);  // AMX-TILE, -BF16, -INT8
  return amx && tiles_granted() ? Level::amx : Level::avx512_bf16;
}

#else

Level ask() { return Level::baseline; }

#endif

// As a person may write it: " AVX2" is avx2.
std::string tidy(const std::string& text) {
  std::string name;
  for (const char c : text) name += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  const char* const blanks = " \t\r\n";
  const size_t first = name.find_first_not_of(blanks);
  return first == std::string::npos ? "" : name.substr(first, name.find_last_not_of(blanks) - first + 1);
}

Level parse(const std::string& name) {
  for (int i = 0; i < kLevels; i++) {
    if (name != kNames[i]) continue;
    FASTDIFF_CHECK(i <= static_cast<int>(highest_level()), "FASTDIFF_CPU_CAPABILITY: this machine has no ", name,
                   "; its highest level is ", level_name(highest_level()));
    return static_cast<Level>(i);
  }
  fail("FASTDIFF_CPU_CAPABILITY: unknown level '", name,
       "'; known levels: baseline, avx2, avx512, avx512_vnni, avx512_bf16, amx");
}

std::atomic<int> chosen{-1};

}  // namespace

const char* level_name(Level level) { return kNames[static_cast<int>(level)]; }

Level highest_level() {
  static const Level level = ask();
  return level;
}

Level level() {
  const int now = chosen.load(std::memory_order_relaxed);
  if (now >= 0) return static_cast<Level>(now);
  const char* wanted = std::getenv("FASTDIFF_CPU_CAPABILITY");
  const std::string name = wanted ? tidy(wanted) : "";
  const Level level = name.empty() ? highest_level() : parse(name);
  chosen.store(static_cast<int>(level), std::memory_order_relaxed);
  return level;
}

void set_level(const std::string& text) {
  const std::string name = tidy(text);
  const Level level = name.empty() ? highest_level() : parse(name);
  chosen.store(static_cast<int>(level), std::memory_order_relaxed);
}

std::vector<std::string> available_levels() {
  return {kNames, kNames + static_cast<int>(highest_level()) + 1};
}

}  // namespace fastdiff
