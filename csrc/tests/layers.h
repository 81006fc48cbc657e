// Layers in double, and packed as the kernels read them (fastdiff/ops/cpu/packing.py): what tests of models' ops share.
#pragma once

#include "check.h"

namespace fastdiff {
namespace tests {

using Floats = std::vector<float>;
using Row = std::vector<double>;
using Rows = std::vector<Row>;

// n rounded up to whole panels
inline int64_t up(int64_t n) { return (n + 15) / 16 * 16; }

inline Row row_of(const Floats& values, int64_t row, int64_t width) {
  return Row(values.begin() + row * width, values.begin() + (row + 1) * width);
}

struct Dense {
  int64_t n_in, n_out;
  Floats weight, bias;  // [n_out][n_in]

  Dense(Draws& draws, int64_t n_in, int64_t n_out)
      : n_in(n_in),
        n_out(n_out),
        weight(draws.normals(n_in * n_out, 1.0 / std::sqrt(static_cast<double>(n_in)))),
        bias(draws.normals(n_out, 0.3)) {}

  Row operator()(const Row& x, bool with_bias = true) const {
    Row y(static_cast<size_t>(n_out));
    for (int64_t o = 0; o < n_out; o++) {
      y[o] = with_bias ? bias[o] : 0.0;
      for (int64_t i = 0; i < n_in; i++) y[o] += static_cast<double>(weight[o * n_in + i]) * x[i];
    }
    return y;
  }
};

struct Norm {
  Floats weight, bias;

  Norm(Draws& draws, int64_t dim) : weight(draws.normals(dim, 0.3)), bias(draws.normals(dim, 0.3)) {
    for (float& w : weight) w += 1.0f;
  }

  Row operator()(Row x, double eps) const {
    const double n = static_cast<double>(x.size());
    double mean = 0, squares = 0;
    for (const double v : x) mean += v / n;
    for (const double v : x) squares += (v - mean) * (v - mean) / n;
    for (size_t i = 0; i < x.size(); i++) x[i] = (x[i] - mean) / std::sqrt(squares + eps) * weight[i] + bias[i];
    return x;
  }
};

// --- packing: each adds to the end of `to` ----------------------------------------------------------------------------

inline void pack(Floats& to, const Floats& vector, double factor = 1.0) {
  for (const float value : vector) to.push_back(static_cast<float>(factor * value));
  to.resize(to.size() + up(static_cast<int64_t>(vector.size())) - vector.size(), 0.0f);
}

// [n_out / 16][last - first][16] of a weight [n_out][n_in], of its inputs first .. last - 1
inline void pack_inputs(Floats& to, const Floats& weight, int64_t n_in, int64_t n_out, int64_t first, int64_t last,
                        double factor = 1.0) {
  for (int64_t panel = 0; panel < n_out; panel += 16) {
    for (int64_t i = first; i < last; i++) {
      for (int64_t o = panel; o < panel + 16; o++) {
        to.push_back(o < n_out ? static_cast<float>(factor * weight[o * n_in + i]) : 0.0f);
      }
    }
  }
}

inline void pack(Floats& to, const Floats& weight, int64_t n_in, int64_t n_out, double factor = 1.0) {
  pack_inputs(to, weight, n_in, n_out, 0, n_in, factor);
}

inline void pack(Floats& to, const Dense& layer, double factor = 1.0) {
  pack(to, layer.weight, layer.n_in, layer.n_out, factor);
  pack(to, layer.bias, factor);
}

inline void pack(Floats& to, const Norm& norm) {
  pack(to, norm.weight);
  pack(to, norm.bias);
}

}  // namespace tests
}  // namespace fastdiff
