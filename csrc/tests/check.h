// What the standalone tests share: EXPECT, drawn numbers, and a walk over the levels of this machine.
//
// A test is one program, test_<subject>.cpp, whose main() returns 0 or ends the process with a message. It is compiled
// with every source of csrc/cpu that needs no torch (csrc/tests/run.py), plain and under the sanitizers, so buffers are
// of the exact size: std::vector, not one array cut into pieces.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <string>
#include <vector>

#include "../cpu/capability.h"

// EXPECT(condition, parts to print...): ends the test with both where the condition is false.
#define EXPECT(condition, ...)                                                                                \
  do {                                                                                                        \
    if (!(condition)) ::fastdiff::tests::stop(__FILE__, __LINE__, #condition, "" __VA_OPT__(, ) __VA_ARGS__); \
  } while (0)

namespace fastdiff {
namespace tests {

template <class... Parts>
[[noreturn]] void stop(const char* file, int line, const char* condition, const Parts&... parts) {
  std::cerr << file << ":" << line << ": not true: " << condition << "  ";
  (std::cerr << ... << parts) << " [level " << level_name(level()) << "]" << std::endl;
  std::_Exit(1);
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// splitmix64: the same numbers everywhere
class Draws {
 public:
  explicit Draws(uint64_t seed) : state_(seed) {}

  uint64_t word() {
    uint64_t h = state_ += 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    return h ^ (h >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(word() % static_cast<uint64_t>(n)); }
  // uniform in (0, 1)
  double uniform() { return (static_cast<double>(word() >> 11) + 0.5) * 0x1p-53; }
  double normal() { return std::sqrt(-2.0 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }
  std::vector<float> normals(int64_t n, double scale = 1.0) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = static_cast<float>(scale * normal());
    return values;
  }

 private:
  uint64_t state_;
};

// max |got - want| <= tolerance * max(1, max |want|), and nothing is NaN
template <class Got, class Want>
void expect_close(const std::vector<Got>& got, const std::vector<Want>& want, double tolerance,
                  const std::string& what) {
  EXPECT(got.size() == want.size(), what, ": ", got.size(), " values, not ", want.size());
  double largest = 1.0;
  for (const Want value : want) largest = std::fmax(largest, std::fabs(static_cast<double>(value)));
  for (size_t i = 0; i < got.size(); i++) {
    const double error = std::fabs(static_cast<double>(got[i]) - static_cast<double>(want[i]));
    EXPECT(error <= tolerance * largest, what, ": [", i, "] is ", got[i], ", not ", want[i]);
  }
}

// Runs body() at every level that this machine has, lowest first.
template <class Body>
void at_every_level(const Body& body) {
  for (const std::string& name : available_levels()) {
    set_level(name);
    body();
  }
  set_level("");
}

}  // namespace tests
}  // namespace fastdiff
