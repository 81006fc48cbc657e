// All steps of a sampler whose denoiser is a causal transformer on a cached prefix, on plain pointers. What the arguments
// mean stands in fastdiff/ops/denoise_attention_loop.py.
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

  int64_t slots() const { return starts[users]; }
  int keys_of(int64_t user) const { return static_cast<int>(starts[user + 1] - starts[user]) + 1; }  // and the pad's
};

// A task is a few rows, all their steps. rows_per_task of them fill one register block of the linear layers.
inline int rows_per_task(const AttentionLoopArgs& args) { return args.branches == 1 ? 6 : 3; }

// How many floats the kernel needs for these rows.
int64_t attention_loop_floats(const AttentionLoopArgs& args, int64_t first_row, int64_t last_row);

// x_0 of rows first_row .. last_row - 1. room is aligned to 64 bytes.
FASTDIFF_KERNEL(void, denoise_attention_loop,
                (const AttentionLoopArgs&, int64_t first_row, int64_t last_row, float* room))

}  // namespace fastdiff
