// Which rows a query may be given: those allowed to all, but for those denied to it.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

// The rows that some of the queries may not be given.
class DeniedRows {
 public:
  DeniedRows(const Search& search, const std::vector<int64_t>& which);

  static int64_t bytes_for(const Search& search, int64_t query);

  // One for each of the queries; null where nothing is denied to any.
  const Denied* get() const { return denied_.empty() ? nullptr : denied_.data(); }

 private:
  std::vector<Denied> denied_;
  Aligned<uint32_t> places_;
};

// What is allowed to all.
struct Allowed {
  std::vector<uint64_t> bits;  // a word per 64 rows; empty where all are allowed
  int64_t count = 0;

  explicit Allowed(const Search& search);

  bool has(int64_t row) const { return bits.empty() || ((bits[static_cast<size_t>(row >> 6)] >> (row & 63)) & 1u); }

  std::vector<int32_t> rows() const;
};

}  // namespace topk
}  // namespace fastdiff
