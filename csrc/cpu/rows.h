// What kernels do to single rows: copying to and from padded ones, sums, LayerNorm. Padded rows end on a whole panel, so
// that their vectors are whole; what stands in the padding is not specified where nothing is said.
#pragma once

#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

FASTDIFF_INLINE int lanes_left(int64_t n, int64_t at) { return n - at < kLanes ? static_cast<int>(n - at) : kLanes; }

// n numbers, then zeros up to padded_n
FASTDIFF_INLINE void pad_row(const float* from, int64_t n, float* to, int64_t padded_n) {
  for (int64_t at = 0; at < padded_n; at += kLanes) {
    store(to + at, at < n ? load_n(from + at, lanes_left(n, at)) : zero());
  }
}

FASTDIFF_INLINE void unpad_row(const float* from, float* to, int64_t n) {
  for (int64_t at = 0; at < n; at += kLanes) store_n(to + at, load(from + at), lanes_left(n, at));
}

// Classifier-free guidance u + g (c - u) over a row of n, then zeros up to padded_n.
FASTDIFF_INLINE void guide_row(const float* cond, const float* uncond, float scale, int64_t n, float* to,
                               int64_t padded_n) {
  for (int64_t at = 0; at < padded_n; at += kLanes) {
    const int left = lanes_left(n, at);
    if (left <= 0) {
      store(to + at, zero());
      continue;
    }
    const Vec u = load_n(uncond + at, left);
    store(to + at, fma(set1(scale), load_n(cond + at, left) - u, u));
  }
}

// y = (x - mean) / sqrt(variance + eps) weight + bias over a row of n; x, y, weight and bias are padded. y may be x.
FASTDIFF_INLINE void layer_norm(const float* x, int64_t n, const float* weight, const float* bias, float eps, float* y) {
  Vec total = zero(), squares = zero();
  for (int64_t at = 0; at < n; at += kLanes) total = total + load_n(x + at, lanes_left(n, at));
  const Vec mean = set1(sum(total) / static_cast<float>(n));
  for (int64_t at = 0; at < n; at += kLanes) {
    const int left = lanes_left(n, at);
    Vec apart = load(x + at) - mean;
    if (left < kLanes) {
      alignas(64) float lanes[kLanes];
      store(lanes, apart);
      apart = load_n(lanes, left);
    }
    squares = fma(apart, apart, squares);
  }
  const Vec by = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps));
  for (int64_t at = 0; at < n; at += kLanes) {
    store(y + at, fma((load(x + at) - mean) * by, load(weight + at), load(bias + at)));
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
