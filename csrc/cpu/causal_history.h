// Causal transformer blocks over the packed rows of many histories, on plain pointers; the two ops that stand on it are
// encode_causal_history and prepare_causal_prefix (see their contracts in fastdiff/ops/).
//
// The work is cut twice: into tiles of rows, and into stages between which a row waits for the keys of those before it.
//     stage 0   the input of the rows, then the projections of block 0
//     stage l   attention and the rest of block l - 1, then the projections of block l, where there is one
// A tile of whole histories can run all stages at once; tiles that cut a history must wait for each other in between.
#pragma once

#include <cstdint>

#include "attention.h"
#include "levels.h"
#include "transformer_block.h"

namespace fastdiff {

struct CausalHistoryArgs {
  BlockShape shape;
  const float* const* blocks;  // n_blocks packed blocks
  int n_blocks, passes;
  int64_t users;
  const int64_t* starts;  // [users + 1]: where each user's rows begin among the rows of one pass
  const float* pads;      // [n_blocks, pad_passes, 2 dim]
  int pad_passes;
  const float* log_pads;  // [users]

  // the input: row j of a user holds item j + item_shift of its history
  const int64_t* items;  // [users, items_step]
  int64_t items_step;
  int item_shift;
  const float* item_table;
  const float *norm_weight, *norm_bias;  // of the encoder's LayerNorm, padded; null for the prefix
  float norm_eps;
  const float* condition;            // [.., dim], the prefix's, packed as condition_starts says; only in pass 0
  const int64_t* condition_starts;   // [users + 1]
  const float* time;                 // [dim]
  float input_scale;
  bool normalize;

  // what is made
  float* rows;         // [rows, dim] after the last block, or null
  float* last;         // [users, dim] the last row of each history that has one, or null
  float* keys_values;  // [n_blocks, passes, rows, 2 dim], or null; then the last block's are the last thing computed

  FASTDIFF_INLINE int64_t n_rows() const { return starts[users]; }
  FASTDIFF_INLINE bool only_last() const { return rows == nullptr && keys_values == nullptr; }
  FASTDIFF_INLINE int stages() const { return keys_values == nullptr ? n_blocks + 1 : n_blocks; }
};

// Rows of one pass that are computed together, with the users that they belong to, and where what they hold lies.
struct CausalTile {
  int pass;
  int64_t first_row, last_row;
  int64_t first_user, last_user;  // those with a row in the tile, last_user excluded
  float* x;                       // x + r * step() is row r of the pass
  const float* seen;              // likewise in steps of qkv_step(): the last stage's queries, keys and values, of all
                                  // rows of the histories up to the tile's end
  float* qkv;                     // those of this stage; `seen` itself where no other tile still looks at it
};

// What a stage needs beside the tile: `longest` is the longest history in it.
FASTDIFF_INLINE int64_t causal_stage_floats(const CausalHistoryArgs& args, int64_t tile_rows, int64_t longest) {
  const BlockShape& shape = args.shape;
  const int keys = static_cast<int>(longest) + 1, width = shape.dim / shape.heads;
  const int64_t cache = key_floats(shape.heads, width, keys) + value_floats(shape.heads, width, keys) + padded(keys) +
                        attend_floats(shape.heads, keys) + attend_causal_floats(keys);
  const int64_t finish = finish_floats(shape, kMostRows);
  return tile_rows * shape.step() + int64_t{kMostRows} * (2 * shape.step() + shape.qkv_step()) +
         (cache > finish ? cache : finish);
}

FASTDIFF_KERNEL(void, causal_stage, (const CausalHistoryArgs&, const CausalTile&, int stage, float* room))

}  // namespace fastdiff
