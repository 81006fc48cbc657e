// The order of score_topk's answers, score descending and then row ascending, as one number per row.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Larger is better: score descending, then row ascending. No NaN, no -0.
inline uint64_t to_key(float score, uint32_t row) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(bits) << 32) | (0xffffffffu - row);
}

// The best first; at most k of them.
void best_first(std::vector<uint64_t>& keys, int64_t k);

// The k best of the keys become the answer of the query, filled up with -1 and -inf.
void answer(const Search& search, int64_t query, std::vector<uint64_t>& keys);

}  // namespace topk
}  // namespace fastdiff
