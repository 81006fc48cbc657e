// The newest slot of a causal transformer over left-padded histories, on plain pointers. What the arguments mean stands
// in fastdiff/ops/encode_padded_history.py.
#pragma once

#include <cstdint>

#include "batch_attention.h"
#include "levels.h"

namespace fastdiff {

// `blocks` holds one buffer per block. Each but the last: qkv, then the rest; the last: query, then of each head the
// key map [D, D / H] without bias and the value map [D / H, D], then the rest. The rest: out, norm_1, up, down, norm_2.
// The queries hold the factor 1 / sqrt(D / H).
struct PaddedHistoryArgs {
  const int64_t* items;    // [users, width], all in the table where they lie inside a history
  const int64_t* lengths;  // [users]
  int width, window;
  int64_t pad_id;
  const float* table;        // [rows, dim]
  const float* positions;    // [window, dim]
  const float* norm_weight;  // packed
  const float* norm_bias;
  const float* const* blocks;
  int n_blocks;
  int dim, hidden, heads;
  bool gelu;  // or relu
  float eps;
  const float* empty;  // [dim]
  float* context;      // [users, dim]
};

constexpr int kPaddedUsers = 6;  // the most of one call: they fill one register block

constexpr int kPaddedChunk = 24;  // rows of the feed-forward part at a time, whose hidden rows then stay in cache

// How many floats a call needs for users whose histories are this long together, the longest `longest`.
inline int64_t padded_history_floats(const PaddedHistoryArgs& args, int64_t slots, int longest) {
  const int64_t step = padded(args.dim), users = kPaddedUsers, hidden = padded(args.hidden), heads = args.heads;
  const KeyPanels panels = {nullptr, nullptr, args.heads, args.dim / args.heads, longest};
  const int64_t full = slots * (padded(3 * args.dim) + step + kPanel) + panels.key_floats() + panels.value_floats() +
                       int64_t{1} * (longest + 1) * padded(longest) + kPaddedChunk * (hidden + step);
  const int64_t last = users * (4 * step + kPanel + heads * step + hidden) + padded(longest);
  return slots * step + (full > last ? full : last) + 8 * kPanel;
}

// The contexts of users first_user .. last_user - 1. room is aligned to 64 bytes.
FASTDIFF_KERNEL(void, encode_padded_history,
                (const PaddedHistoryArgs&, int64_t first_user, int64_t last_user, float* room))

}  // namespace fastdiff
