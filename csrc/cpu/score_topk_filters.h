// Which rows a query may be given: those allowed to all, but for those denied to it.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

// The rows that one query may not be given: a hash table of 2^bits places, ~0 where empty; none where bits is 0. Beside
// it each row has set one of 2^(bits + 3) marks, which answer for most of the other rows: they are a quarter of the
// memory, and all of it is cold when it is asked, because the item table has gone through the caches.
struct Denied {
  uint32_t* places = nullptr;
  uint64_t* marks = nullptr;
  int bits = 0;

  static uint64_t hash(uint32_t row) { return row * 0x9e3779b97f4a7c15u; }
  uint64_t mark(uint64_t hash) const { return hash >> (61 - bits); }

  // Where the row is, or the empty place where it would be.
  uint32_t& place(uint32_t row, uint64_t hash) const {
    const uint64_t mask = (uint64_t{1} << bits) - 1u;
    uint64_t at = hash >> (64 - bits);
    while (places[at] != row && places[at] != ~0u) at = (at + 1) & mask;
    return places[at];
  }
  void add(uint32_t row) const {
    const uint64_t h = hash(row), m = mark(h);
    marks[m / 64] |= uint64_t{1} << (m % 64);
    place(row, h) = row;
  }
  bool has(uint32_t row) const {
    if (bits == 0) return false;
    const uint64_t h = hash(row), m = mark(h);
    return ((marks[m / 64] >> (m % 64)) & 1u) != 0 && place(row, h) == row;
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
  Aligned<uint64_t> memory_;
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
