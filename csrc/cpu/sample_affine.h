// x_0 = G u + k + L z for a block of rows, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

constexpr int kAffineRows = 24;  // the most rows of one call

struct SampleAffineArgs {
  const float* weights;  // G's panels, k padded, L's panels
  const float* cond;     // [rows, dim]
  const float* z;        // [rows, dim], or null: draw 0 of ..
  uint64_t seed;
  const int64_t* row_key;  // [rows]
  const int64_t* sample;   // [rows]
  int rows, dim;
  float* scratch;  // affine_scratch(dim) floats
  float* x_0;      // [rows, dim]
};

FASTDIFF_KERNEL(void, sample_affine, (const SampleAffineArgs&))

}  // namespace fastdiff
