// The weights of one post-norm transformer block as they lie in one buffer (packed by fastdiff/ops/cpu/transformer.py):
// qkv, out, norm_1, up, down, norm_2; of each linear layer its panels, then its bias; of each norm its weight and bias.
#pragma once

#include <cstdint>

#include "linear.h"

namespace fastdiff {

struct BlockShape {
  int dim, hidden, heads;
  float eps;

  FASTDIFF_INLINE int qkv_step() const { return padded(3 * dim); }
  FASTDIFF_INLINE int step() const { return padded(dim); }
  FASTDIFF_INLINE int hidden_step() const { return padded(hidden); }
};

FASTDIFF_INLINE int64_t layer_floats(int n_in, int n_out) { return static_cast<int64_t>(padded(n_out)) * (n_in + 1); }

FASTDIFF_INLINE int64_t block_floats(const BlockShape& shape) {
  return layer_floats(shape.dim, 3 * shape.dim) + layer_floats(shape.dim, shape.dim) +
         layer_floats(shape.dim, shape.hidden) + layer_floats(shape.hidden, shape.dim) + int64_t{4} * shape.step();
}

struct Block {
  BlockShape shape;
  Linear qkv, out, up, down;
  const float *norm_1_weight, *norm_1_bias, *norm_2_weight, *norm_2_bias;

  FASTDIFF_INLINE Block(const float* at, const BlockShape& shape)
      : shape(shape),
        qkv(next_layer(at, shape.dim, 3 * shape.dim)),
        out(next_layer(at, shape.dim, shape.dim)),
        up(),
        down() {
    norm_1_weight = next(at, shape.step());
    norm_1_bias = next(at, shape.step());
    up = next_layer(at, shape.dim, shape.hidden);
    down = next_layer(at, shape.hidden, shape.dim);
    norm_2_weight = next(at, shape.step());
    norm_2_bias = next(at, shape.step());
  }

 private:
  FASTDIFF_INLINE static const float* next(const float*& at, int64_t floats) {
    const float* here = at;
    at += floats;
    return here;
  }
  FASTDIFF_INLINE static Linear next_layer(const float*& at, int n_in, int n_out) {
    const float* weight = next(at, static_cast<int64_t>(padded(n_out)) * n_in);
    return {weight, next(at, padded(n_out)), n_in, n_out};
  }
};

// What finish_block (transformer.h) needs beside its arguments.
FASTDIFF_INLINE int64_t finish_floats(const BlockShape& shape, int rows) {
  return static_cast<int64_t>(rows) * (shape.step() + shape.hidden_step());
}

}  // namespace fastdiff
