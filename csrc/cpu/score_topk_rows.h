// score_topk of a small table for one query, on plain pointers: all scores into memory, then what may count among them.
//
// Where the scores of a query fit into the first caches, there is no need to keep rows while the floor still rises: the
// k-th best of many small groups' best scores, less their slack, is a floor close to the best there is.
#pragma once

#include "score_topk.h"

namespace fastdiff {
namespace topk {

constexpr int64_t kStretch = 256;  // scores are made, and padded, by so many rows: a multiple of every level's needs

struct RowsArgs {
  Table table;
  Product product;  // float32, int8, or tiles, whose rows must be a multiple of 64 bytes
  Queries queries;
  int64_t query;
  const uint64_t* allowed;  // a bit per row, a word per block; null: all
  float* scores;            // [n_rows rounded up to kStretch]; -inf for rows not allowed, and beyond the last
  float* scratch;           // [64, dim]
  float* low;               // topk_row_floors: of groups of 16 rows, the highest score less its slack; -inf for none
  int32_t* rows;            // topk_rows_reaching: [n_rows]
};

}  // namespace topk

// args.scores
FASTDIFF_KERNEL_ALL(void, topk_row_scores, (const topk::RowsArgs&))

// args.low of args.scores; how many groups: a sixteenth of the padded rows
FASTDIFF_KERNEL_ALL(int64_t, topk_row_floors, (const topk::RowsArgs&))

// The rows whose score and slack reach the floor, into args.rows; how many they are.
FASTDIFF_KERNEL_ALL(int64_t, topk_rows_reaching, (const topk::RowsArgs&, float floor))

}  // namespace fastdiff
