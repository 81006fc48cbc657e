// Which rows a query may be given: those allowed to all, but for those denied to it.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

// The rows that one query may not be given: a hash table of 2^bits places, ~0 where empty; null for none.
struct Denied {
  const uint32_t* places;
  int bits;

  static uint32_t start(uint32_t row, int bits) { return (row * 2654435769u) >> (32 - bits); }
  void prefetch(uint32_t row) const { __builtin_prefetch(places + start(row, bits)); }
  bool has(uint32_t row) const {
    const uint32_t mask = (1u << bits) - 1u;
    for (uint32_t at = start(row, bits);; at = (at + 1) & mask) {
      if (places[at] == row) return true;
      if (places[at] == ~0u) return false;
    }
  }
};

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
