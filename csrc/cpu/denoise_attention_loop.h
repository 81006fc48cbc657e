// All steps of a sampler whose denoiser is a causal transformer on a cached prefix, on plain pointers. What the
// arguments mean stands in fastdiff/ops/denoise_attention_loop.py.
#pragma once

#include <cstdint>

#include "attention.h"
#include "levels.h"
#include "team.h"
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

// A task is some rows, all their steps. The weights of all blocks pass by once per step and task.
FASTDIFF_INLINE int rows_per_task(const AttentionLoopArgs& args) { return args.branches == 1 ? 24 : 12; }

// Passes through the blocks of one step of some rows, each branch of each row one pass.
FASTDIFF_INLINE int passes_of(const AttentionLoopArgs& args, int64_t rows) {
  return static_cast<int>(rows) * args.branches;
}

// What a thread needs to itself for `rows` rows, and what those that compute the same rows share; parts begin on panels.
FASTDIFF_INLINE int64_t loop_own_floats(const AttentionLoopArgs& args, int64_t rows, int most_keys) {
  return int64_t{passes_of(args, rows)} * (args.shape.step() + args.shape.qkv_step()) +
         padded(static_cast<int>(attend_floats(args.shape.heads, most_keys)));
}
FASTDIFF_INLINE int64_t loop_shared_floats(const AttentionLoopArgs& args, int64_t rows) {
  const int passes = passes_of(args, rows);
  return int64_t{passes} * args.shape.step() + finish_floats(args.shape, passes);
}

FASTDIFF_INLINE int most_keys_of(const AttentionLoopArgs& args, int64_t first_user, int64_t last_user) {
  int most = 0;
  for (int64_t user = first_user; user <= last_user; user++) {
    most = args.keys_of(user) > most ? args.keys_of(user) : most;
  }
  return most;
}

// What the kernel needs for these rows; a leader needs what is shared twice.
FASTDIFF_INLINE int64_t attention_loop_floats(const AttentionLoopArgs& args, int64_t first_row, int64_t last_row,
                                              bool leader = false) {
  const BlockShape& shape = args.shape;
  const int width = shape.dim / shape.heads;
  const int64_t rows = last_row - first_row;
  const int64_t first_user = first_row / args.samples, last_user = (last_row - 1) / args.samples;
  const int most_keys = most_keys_of(args, first_user, last_user);
  int64_t cache = 0;
  for (int64_t user = first_user; user <= last_user; user++) {
    const int n_keys = args.keys_of(user);
    cache += key_floats(shape.heads, width, n_keys) + value_floats(shape.heads, width, n_keys);
  }
  return rows * (2 * shape.step() + shape.dim + 64) + loop_own_floats(args, rows, most_keys) +
         (leader ? 2 : 1) * loop_shared_floats(args, rows) + (last_user - first_user + 1) * padded(most_keys) +
         cache * args.n_blocks * args.branches;
}

// Few rows leave threads without a task, and their weights do not fit one thread's caches: then a team computes them
// all. Of so many passes at most is its work smaller than what the weights cost.
constexpr int kTeamPasses = 6;

FASTDIFF_INLINE int meetings_of_step(const AttentionLoopArgs& args) { return 4 * args.n_blocks; }

// What a leader shows to its team: where everything stands that they share.
struct AttentionLoopShared {
  float* x;      // [rows, step()], of the round
  float* work;   // loop_shared_floats
  float* cache;  // keys and values
  float* bias;   // [users, padded(most_keys)]
};

// x_0 of rows first_row .. last_row - 1. room is aligned to 64 bytes.
FASTDIFF_KERNEL(void, denoise_attention_loop,
                (const AttentionLoopArgs&, int64_t first_row, int64_t last_row, float* room))
// x_0 of all rows, computed by a team: by who leads it, with attention_loop_floats(.., true) of room, and by who helps,
// with loop_own_floats of all rows. The leader says false if the team broke up.
FASTDIFF_KERNEL(bool, lead_attention_loop, (const AttentionLoopArgs&, Team&, AttentionLoopShared&, float* room))
FASTDIFF_KERNEL(void, help_attention_loop, (const AttentionLoopArgs&, Team&, const AttentionLoopShared&, float* room))

}  // namespace fastdiff
