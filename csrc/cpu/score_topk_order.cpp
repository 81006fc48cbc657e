#include "score_topk_order.h"

#include <algorithm>

namespace fastdiff {
namespace topk {
namespace {

void from_key(uint64_t key, int64_t* row, float* score) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
  std::memcpy(score, &bits, 4);
  *row = static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key));
}

}  // namespace

void best_first(std::vector<uint64_t>& keys, int64_t k) {
  const auto descending = [](uint64_t a, uint64_t b) { return a > b; };
  if (static_cast<int64_t>(keys.size()) > k) {
    std::nth_element(keys.begin(), keys.begin() + k, keys.end(), descending);
    keys.resize(static_cast<size_t>(k));
  }
  std::sort(keys.begin(), keys.end(), descending);
}

void answer(const Search& search, int64_t query, std::vector<uint64_t>& keys) {
  const int64_t k = search.k;
  best_first(keys, k);
  int64_t* const rows = search.rows + query * k;
  float* const scores = search.scores + query * k;
  const int64_t n = static_cast<int64_t>(keys.size());
  for (int64_t i = 0; i < n; i++) from_key(keys[static_cast<size_t>(i)], rows + i, scores + i);
  std::fill(rows + n, rows + k, -1);
  std::fill(scores + n, scores + k, -kInfinity);
}

}  // namespace topk
}  // namespace fastdiff
