// The affine update of every sampler, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

struct SamplerStepArgs {
  const float* model_output;  // [rows, dim]
  const float* x_t;           // [rows, dim]
  const float* noise;         // [rows, dim], or null where c_noise is 0
  float* x_prev;              // [rows, dim]; may be x_t itself
  int64_t rows;
  int64_t dim;
  float c_out, c_xt, c_noise;
  bool normalize;
};

FASTDIFF_KERNEL(void, sampler_step, (const SamplerStepArgs&))

}  // namespace fastdiff
