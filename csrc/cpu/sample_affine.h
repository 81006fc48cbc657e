// x_0 = G c + k + L z, guidance in c, for a block of rows, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

constexpr int kAffineRows = 24;  // the most rows of one call

namespace {  // each file has its own copy, compiled for its own instruction set

// Floats of scratch: of each row its normals, its x_0 and its guided condition, each padded.
constexpr int64_t affine_scratch(int64_t dim) {
  return kAffineRows * ((dim + 63) / 64 * 64 + 2 * ((dim + 15) / 16 * 16));
}

}  // namespace

struct SampleAffineArgs {
  const float* weights;  // G's panels, k padded, L's panels
  const float* cond;     // [rows, dim]
  const float* uncond;   // rows uncond_step apart, or null: guidance is off
  int64_t uncond_step;   // dim, or 0: one for all
  float guidance_scale;
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
