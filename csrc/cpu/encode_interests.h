// The interests of ragged histories, for a block of users, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

constexpr int kInterestUsers = 24;   // the most users of one call
constexpr int kInterestPlaces = 24;  // the places that go through the layers together

struct EncodeInterestsArgs {
  const int64_t* items;    // [rows, places]
  const int64_t* lengths;  // [rows]
  int64_t places;
  const float* table;  // [table_rows, dim]
  int64_t table_rows;
  // panels and bias of w_1 and of w_2, then the positions [window, padded dim]; null: the last items are the interests
  const float* weights;
  int64_t window;
  int dim, hidden, interests;
  int64_t pad_id;
  bool positions_in_values;
  int rows;
  float* scratch;  // interest_scratch() floats
  float* g;        // [rows, interests, dim]
};

// The floats of scratch: the places under way before and behind w_1, a user's sums, and every place's logits.
constexpr int64_t interest_scratch(int64_t rows, int64_t places, int64_t dim, int64_t hidden, int64_t interests) {
  return kInterestPlaces * ((dim + 15) / 16 * 16 + (hidden + 15) / 16 * 16) + interests * ((dim + 15) / 16 * 16) +
         (rows * places + kInterestPlaces) * ((interests + 15) / 16 * 16);
}

// False where an item of a history is not a row of the table, or a length is not one.
FASTDIFF_KERNEL(bool, encode_interests, (const EncodeInterestsArgs&))

}  // namespace fastdiff
