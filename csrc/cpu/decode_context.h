// All steps of a sampler whose denoiser reads the user's context and the step alone, on plain pointers. What the
// arguments mean stands in fastdiff/ops/decode_context.py.
#pragma once

#include <cstdint>

#include "batch_attention.h"
#include "levels.h"

namespace fastdiff {

// `weights` is one buffer: qkv (the queries hold the factor 1 / sqrt(D / H)) where the users are coupled, the values
// alone where they are not; then out, norm_1, linear_1, linear_2, norm_2, norm_3.
struct ContextArgs {
  const float* weights;
  int dim, heads;
  bool coupled, gelu;
  float eps;
  int64_t users, samples;  // rows = users * samples
  const float* context;    // [users, dim]
  // where users are coupled, filled by project_context and read by decode_context:
  float* queries;  // [users, padded(3 dim)]
  float* keys;     // KeyPanels (batch_attention.h), their tails cleared by clear_context
  float* values;

  const float* cross;  // [steps, dim]
  const double* coef;  // [steps, 3]
  int steps;
  bool normalize;
  const float* x_t;        // [rows, dim], or null where the first step does not read it
  const float* noise;      // [steps, rows, dim]; null where Philox draws or no step does
  const int64_t* row_key;  // [rows], or null where Philox does not draw
  const int64_t* sample;   // [rows]
  uint64_t seed;
  int64_t first_draw;  // of step 0
  float* x_0;          // [rows, dim]
};

constexpr int kContextUsers = 6;  // the most of one call

// How many floats a call of decode_context needs.
inline int64_t context_floats(const ContextArgs& args) {
  const int64_t step = padded(args.dim), scores = args.coupled ? padded(static_cast<int>(args.users)) : 0;
  return kContextUsers * (5 * step + kPanel + scores) + step + 64 + 6 * kPanel;
}

// Zeros behind the last key, once per call.
FASTDIFF_KERNEL(void, clear_context, (const ContextArgs&))
// Queries, keys and values of users first .. last - 1.
FASTDIFF_KERNEL(void, project_context, (const ContextArgs&, int64_t first, int64_t last))
// x_0 of users first .. last - 1. room is aligned to 64 bytes.
FASTDIFF_KERNEL(void, decode_context, (const ContextArgs&, int64_t first, int64_t last, float* room))

}  // namespace fastdiff
