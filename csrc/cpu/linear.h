// Packed linear layers: y = x W^T + b for a few rows at a time, register-blocked.
//
// Weights [n_out, n_in] are packed in panels of 16 outputs, [ceil(n_out / 16)][n_in][16], the outputs beyond n_out zero
// (fastdiff/ops/cpu/packing.py). Every output is one chain  fma(x_k, w_k, ..)  from its bias over k = 0, 1, ..; how rows
// and panels are blocked does not change it, so a row's bits do not depend on the rows beside it.
#pragma once

#include "simd.h"

namespace fastdiff {

constexpr int kPanel = 16;

constexpr int padded(int n) { return (n + kPanel - 1) / kPanel * kPanel; }

// weight and bias are packed: bias holds padded(n_out) floats, or is null for zeros.
struct Linear {
  const float* weight;
  const float* bias;
  int n_in;
  int n_out;
};

namespace FASTDIFF_LEVEL {

#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockVecs = 4;  // 24 sums, 4 weights and a broadcast in 32 registers
constexpr int kRowVecs = 8;                    // one row alone: enough chains to hide an fma's latency
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockVecs = 2;  // 12 sums, 2 weights and a broadcast in 16 registers
constexpr int kRowVecs = 8;
#else
constexpr int kBlockRows = 4, kBlockVecs = 2;
constexpr int kRowVecs = 8;
#endif
constexpr int kVecsPerPanel = kPanel / kLanes;

// Vector number v of a layer: which panel, and where in it.
FASTDIFF_INLINE const float* weight_vec(const Linear& layer, int v) {
  return layer.weight + static_cast<int64_t>(v / kVecsPerPanel) * layer.n_in * kPanel + v % kVecsPerPanel * kLanes;
}

// rows R, vectors V of outputs from vector `first`: y[r][..] = start + sum_k x[r][k] w_k. `add` starts from y, not from
// the bias.
template <int R, int V>
FASTDIFF_INLINE void linear_block(const Linear& layer, const float* x, int64_t x_step, float* y, int64_t y_step,
                                  int first, bool add) {
  Vec sums[R][V];
  const float* weight[V];
  for (int v = 0; v < V; v++) {
    weight[v] = weight_vec(layer, first + v);
    const Vec bias = layer.bias == nullptr ? zero() : load(layer.bias + (first + v) * kLanes);
    for (int r = 0; r < R; r++) sums[r][v] = add ? load(y + r * y_step + (first + v) * kLanes) : bias;
  }
  const int n_in = layer.n_in;
  for (int k = 0; k < n_in; k++) {
    Vec w[V];
    for (int v = 0; v < V; v++) w[v] = load(weight[v] + static_cast<int64_t>(k) * kPanel);
    for (int r = 0; r < R; r++) {
      const Vec by = set1(x[r * x_step + k]);
      for (int v = 0; v < V; v++) sums[r][v] = fma(by, w[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) store(y + r * y_step + (first + v) * kLanes, sums[r][v]);
  }
}

template <int R, int V>
FASTDIFF_INLINE int linear_columns(const Linear& layer, const float* x, int64_t x_step, float* y, int64_t y_step,
                                   int first, int last, bool add) {
  for (; first + V <= last; first += V) linear_block<R, V>(layer, x, x_step, y, y_step, first, add);
  return first;
}

template <int R>
FASTDIFF_INLINE void linear_rows(const Linear& layer, const float* x, int64_t x_step, float* y, int64_t y_step,
                                 int first, int last, bool add) {
  first = linear_columns<R, R == 1 ? kRowVecs : kBlockVecs>(layer, x, x_step, y, y_step, first, last, add);
  if (R == 1) first = linear_columns<R, 4>(layer, x, x_step, y, y_step, first, last, add);
  first = linear_columns<R, 2>(layer, x, x_step, y, y_step, first, last, add);
  linear_columns<R, 1>(layer, x, x_step, y, y_step, first, last, add);
}

// y [rows, padded(n_out)] = x [rows, n_in] W^T + b, rows x_step and y_step floats apart; with `add`, y += x W^T (and b is
// not added). Writes the padding of y too: zeros, or the bias's. x and y must not overlap. Only the panels from
// first_panel to last_panel (default: all) are computed.
inline void linear(const Linear& layer, const float* x, int64_t x_step, int rows, float* y, int64_t y_step,
                   bool add = false, int first_panel = 0, int last_panel = -1) {
  const int first = first_panel * kVecsPerPanel;
  const int last = (last_panel < 0 ? padded(layer.n_out) / kPanel : last_panel) * kVecsPerPanel;
  int row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) {
    linear_rows<kBlockRows>(layer, x + row * x_step, x_step, y + row * y_step, y_step, first, last, add);
  }
  for (; row + 2 <= rows; row += 2) {
    linear_rows<2>(layer, x + row * x_step, x_step, y + row * y_step, y_step, first, last, add);
  }
  if (row < rows) linear_rows<1>(layer, x + row * x_step, x_step, y + row * y_step, y_step, first, last, add);
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
