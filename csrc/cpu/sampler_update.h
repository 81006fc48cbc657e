// One row of the sampler's update: x_prev = c_out output + c_xt x_t + c_noise noise, then on the unit sphere if wanted.
#pragma once

#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

// noise is read only where c_noise is not 0. x_prev may be x_t. A norm under 1e-12 counts as 1e-12.
FASTDIFF_INLINE void update_row(const float* output, const float* x_t, const float* noise, float* x_prev, int dim,
                                float c_out, float c_xt, float c_noise, bool normalize) {
  const Vec by_out = set1(c_out), by_xt = set1(c_xt), by_noise = set1(c_noise);
  Vec squares = zero();
  for (int at = 0; at < dim; at += kLanes) {
    const int n = dim - at < kLanes ? dim - at : kLanes;
    Vec x = by_out * load_n(output + at, n);
    if (c_xt != 0.0f) x = fma(by_xt, load_n(x_t + at, n), x);
    if (c_noise != 0.0f) x = fma(by_noise, load_n(noise + at, n), x);
    squares = fma(x, x, squares);  // lanes beyond the row are 0
    store_n(x_prev + at, x, n);
  }
  if (!normalize) return;
  float norm = __builtin_sqrtf(sum(squares));
  if (norm < 1e-12f) norm = 1e-12f;
  const Vec by = set1(norm);
  for (int at = 0; at < dim; at += kLanes) {
    const int n = dim - at < kLanes ? dim - at : kLanes;
    store_n(x_prev + at, load_n(x_prev + at, n) / by, n);
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
