// Layers that follow one another in a packed buffer, and the half of a post-norm block behind its attention.
//
// Of a linear layer the panels come first, then its bias; of a norm its weight, then its bias
// (fastdiff/ops/cpu/packing.py).
#pragma once

#include "transformer.h"

namespace fastdiff {

// How many floats a packed layer takes, with its bias or without.
inline int64_t packed_layer(int64_t n_in, int64_t n_out, bool bias = true) {
  return static_cast<int64_t>(padded(static_cast<int>(n_out))) * (n_in + (bias ? 1 : 0));
}

namespace FASTDIFF_LEVEL {

struct Norm {
  const float* weight;
  const float* bias;
};

struct Layers {
  const float* at;

  FASTDIFF_INLINE const float* take(int64_t floats) {
    const float* here = at;
    at += floats;
    return here;
  }
  FASTDIFF_INLINE Linear layer(int n_in, int n_out, bool bias = true) {
    const float* weight = take(static_cast<int64_t>(padded(n_out)) * n_in);
    return {weight, bias ? take(padded(n_out)) : nullptr, n_in, n_out};
  }
  FASTDIFF_INLINE Norm norm(int dim) {
    const float* weight = take(padded(dim));
    return {weight, take(padded(dim))};
  }
};

// x = act(x), over whole vectors: `width` is a multiple of a panel. gelu is the exact one.
inline void activate_rows(bool gelu_not_relu, float* x, int64_t step, int rows, int width) {
  for (int row = 0; row < rows; row++) {
    float* of_row = x + row * step;
    if (gelu_not_relu) {
      for (int at = 0; at < width; at += kLanes) store(of_row + at, gelu(load(of_row + at)));
    } else {
      for (int at = 0; at < width; at += kLanes) store(of_row + at, relu(load(of_row + at)));
    }
  }
}

// x = norm(x + down(act(up(x)))), rows x_step apart; room holds rows * (padded(up.n_out) + x_step) floats.
inline void feed_forward(const Linear& up, const Linear& down, const Norm& norm, bool gelu_not_relu, float eps,
                         float* x, int64_t x_step, int rows, float* room) {
  const int hidden = padded(up.n_out);
  float* const y = room + static_cast<int64_t>(rows) * hidden;
  linear_spread(up, x, x_step, rows, room, hidden);
  activate_rows(gelu_not_relu, room, hidden, rows, hidden);
  linear_spread(down, room, hidden, rows, y, x_step);
  layer_norm_rows(y, x_step, x, x_step, rows, down.n_out, norm.weight, norm.bias, eps, x, x_step);
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
