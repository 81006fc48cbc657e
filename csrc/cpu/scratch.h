// Memory for the temporaries of one task, kept by its thread from call to call.
#pragma once

#include <cstdint>
#include <vector>

namespace fastdiff {

// n floats from a 64-byte boundary on, until this thread asks again.
inline float* scratch(int64_t n) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < n + 16) memory.resize(static_cast<size_t>(n + 16));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// How many of `tasks` rows one task takes: as many tasks for each thread, each worth `least` units of work, `most` rows.
inline int64_t rows_per_task(int64_t rows, double work_per_row, int threads, int64_t most, double least) {
  const double worth = static_cast<double>(rows) * work_per_row / least;
  const int64_t used = worth < 1 ? 1 : worth > threads ? threads : static_cast<int64_t>(worth);
  const int64_t rounds = (rows + used * most - 1) / (used * most);
  const int64_t tasks = used * rounds;
  return rows < 1 ? 1 : (rows + tasks - 1) / tasks;
}

}  // namespace fastdiff
