// Queries in the form of a product, with the factors of what the scan may be wrong by.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

constexpr int64_t kFewQueries = 3;  // up to so many read rows where they lie, by vectors

// few: for kFewQueries or less of any table, or of one whose scores all fit into memory.
enum class Few { no, queries, queries_of_small_table };

// How rows of the table are best multiplied on this machine.
Product product_for(const Table& table, Few few);

// Some of the queries in the form of a product, with the factors of their slack.
class Prepared {
 public:
  // residual: whether the table's bounds hold what its rows lose in this product; if not, the worst case is taken
  Prepared(const Search& search, const std::vector<int64_t>& which, Product product, Stored stored, bool residual,
           double largest_norm);

  Queries view() const;

 private:
  uint32_t& word(int64_t query, int64_t word, bool tiles) const {
    return tiles ? words_[query / kTile * steps_ * kTile + word * kTile + query % kTile]
                 : words_[query * steps_ + word];
  }

  int64_t n_, padded_, dim_, steps_ = 0;
  Aligned<float> floats_;
  Aligned<uint32_t> words_;
  Aligned<float> factors_;
  Aligned<int32_t> zero_;
};

}  // namespace topk
}  // namespace fastdiff
