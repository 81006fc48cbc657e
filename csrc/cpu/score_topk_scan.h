// The scan of a table for many queries, by many threads, and of a small table for few.
#pragma once

#include <cstdint>
#include <vector>

#include "score_topk_filters.h"
#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

// How a table is scanned.
struct Way {
  const Table& table;
  Product product;
  bool residual;                     // whether table.bounds holds the product's residuals
  const std::vector<int32_t>* some;  // the only rows allowed; null: all
};

// Scans for the queries `which`, as many at a time as the buffers may hold, and writes their answers. Returns those
// without an answer. guess: whether a sample may say what is worth keeping.
std::vector<int64_t> scan_all(const Search& search, const Way& way, const Allowed& allowed,
                              const std::vector<int64_t>& which, double largest_norm, bool guess, Report& report);

// Few queries of a small table, on this thread: to wake another takes longer.
void scan_small(const Search& search, const Way& way, const Allowed& allowed, const std::vector<int64_t>& which,
                double largest_norm, Report& report);

}  // namespace topk
}  // namespace fastdiff
