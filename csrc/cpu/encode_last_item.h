// The last row of one causal transformer block over ragged histories, or a linear layer of it, for a block of users,
// on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

constexpr int kEncodeRows = 24;  // the most users of one call

struct EncodeLastItemArgs {
  const int64_t* items;    // [rows, places]
  const int64_t* lengths;  // [rows]
  int64_t places;
  const float* table;  // [table_rows, dim]
  int64_t table_rows;
  // each layer's panels and bias: qk, v, feed-forward 1 and 2, head; then weight and bias of each norm: 1, 2,
  // feed-forward, 3; then the positions [window, padded dim]
  const float* weights;
  int window, dim, outputs;  // outputs: of the head; 0 where there is none, and its panels are not there
  int64_t pad_id;
  float eps;
  int rows;
  float* scratch;  // encode_scratch() floats
  float* h;        // [rows, outputs], or [rows, dim] without a head
};

// The floats of scratch for kEncodeRows users: four rows each, one item, the logits of one user, and the head's rows.
constexpr int64_t encode_scratch(int64_t dim, int64_t places, int64_t outputs) {
  return (4 * kEncodeRows + 1) * ((dim + 15) / 16 * 16) + (places + 31) / 16 * 16 +
         kEncodeRows * ((outputs + 15) / 16 * 16);
}

// False where an item of a history is not a row of the table.
FASTDIFF_KERNEL(bool, encode_last_item, (const EncodeLastItemArgs&))

}  // namespace fastdiff
