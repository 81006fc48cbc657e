// All steps of a sampler whose denoiser is a causal transformer on a cached prefix, on plain pointers. What the
// arguments mean stands in fastdiff/ops/denoise_attention_loop.py.
#pragma once

#include <cstdint>

#include "attention.h"
#include "levels.h"
#include "transformer_block.h"

namespace fastdiff {

struct AttentionLoopArgs {
  BlockShape shape;
  const float* const* blocks;  // n_blocks packed blocks
  int n_blocks, branches;
  int64_t rows, users, samples;  // rows = users * samples
  int steps;
  const float* x_t;          // [rows, dim]
  float* x_0;                // [rows, dim]
  const float* cond;         // [branches, users, dim]
  const float* keys_values;  // [n_blocks, branches, slots, 2 dim]
  const int64_t* starts;     // [users + 1]: user b's slots are starts[b] .. starts[b + 1] - 1
  const float* pad;          // [n_blocks, branches, 2 dim]
  const float* log_pads;     // [users]
  const bool* uniform;       // [users], or null
  const float* time;         // [steps, dim]
  const double* coef;        // [steps, 3]
  const float* noise;        // [steps, rows, dim]; null where Philox draws or no step does
  const int64_t* row_key;    // [rows], or null where Philox does not draw
  const int64_t* sample;     // [rows]
  uint64_t seed;
  float guidance_scale, input_scale;
  bool normalize;

  FASTDIFF_INLINE int64_t slots() const { return starts[users]; }
  // a user's slots and the pad before them
  FASTDIFF_INLINE int keys_of(int64_t user) const { return static_cast<int>(starts[user + 1] - starts[user]) + 1; }
};

// A task is a few rows, all their steps. rows_per_task of them fill one register block of the linear layers.
FASTDIFF_INLINE int rows_per_task(const AttentionLoopArgs& args) { return args.branches == 1 ? 6 : 3; }

// How many floats the kernel needs for these rows.
FASTDIFF_INLINE int64_t attention_loop_floats(const AttentionLoopArgs& args, int64_t first_row, int64_t last_row) {
  const BlockShape& shape = args.shape;
  const int width = shape.dim / shape.heads;
  const int64_t rows = last_row - first_row, passes = rows * args.branches;
  const int64_t first_user = first_row / args.samples, last_user = (last_row - 1) / args.samples;
  int most_keys = 0;
  int64_t cache = 0;
  for (int64_t user = first_user; user <= last_user; user++) {
    const int n_keys = args.keys_of(user);
    most_keys = n_keys > most_keys ? n_keys : most_keys;
    cache += key_floats(shape.heads, width, n_keys) + value_floats(shape.heads, width, n_keys);
  }
  const int64_t parts = 8 + 2 * (last_user - first_user + 1) * args.n_blocks * args.branches;
  return rows * (shape.step() + shape.dim + 64) + passes * (2 * shape.step() + shape.qkv_step()) +
         finish_floats(shape, static_cast<int>(passes)) + attend_floats(shape.heads, most_keys) +
         (last_user - first_user + 1) * padded(most_keys) + cache * args.n_blocks * args.branches + parts * kPanel;
}

// x_0 of rows first_row .. last_row - 1. room is aligned to 64 bytes.
FASTDIFF_KERNEL(void, denoise_attention_loop,
                (const AttentionLoopArgs&, int64_t first_row, int64_t last_row, float* room))

}  // namespace fastdiff
