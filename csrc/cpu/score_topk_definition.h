// Rows scored by the definition: all of a query's, those listed for it, or those that a scan has left.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "score_topk_exact.h"
#include "score_topk_filters.h"
#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

// Of one task: its memory is used for one query after the other.
class Rescoring {
 public:
  explicit Rescoring(const Search& search) : search_(search), scratch_(16 * search.scan.dim) {}

  // The k best of the rows named (each once) become the answer of the query.
  void write_of(int64_t query, const std::vector<int32_t>& rows);

 private:
  const Search& search_;
  Aligned<float> scratch_;
  std::vector<float> scores_;
  std::vector<uint64_t> keys_;
  void (*const exact_)(const ExactArgs&) = FASTDIFF_PICK(topk_exact);
};

// All rows that the queries `which` may be given.
void by_definition(const Search& search, const Allowed& allowed, const std::vector<int64_t>& which);

// Only the rows listed, each once, for all queries.
void of_candidates(const Search& search, const Allowed& allowed);

}  // namespace topk
}  // namespace fastdiff
