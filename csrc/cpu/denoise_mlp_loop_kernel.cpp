// levels: baseline avx2 avx512
#include "denoise_mlp_loop.h"

#include "denoise_mlp_loop_layout.h"
#include "linear.h"
#include "philox.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

FASTDIFF_INLINE int lanes_left(int64_t n, int64_t at) { return n - at < kLanes ? static_cast<int>(n - at) : kLanes; }

void copy_row(const float* from, int64_t n, float* to, int64_t padded_n) {
  for (int64_t at = 0; at < padded_n; at += kLanes) {
    store(to + at, at < n ? load_n(from + at, lanes_left(n, at)) : zero());
  }
}

template <int activation>
FASTDIFF_INLINE Vec activate(Vec x) {
  if (activation == kGelu) return gelu(x);
  if (activation == kRelu) return relu(x);
  if (activation == kSilu) return silu(x);
  return tanh(x);
}

template <int activation>
void activate_all(float* values, int64_t n) {
  for (int64_t at = 0; at < n; at += kLanes) store(values + at, activate<activation>(load(values + at)));
}

void activate_all(int activation, float* values, int64_t n) {
  if (activation == kGelu) return activate_all<kGelu>(values, n);
  if (activation == kRelu) return activate_all<kRelu>(values, n);
  if (activation == kSilu) return activate_all<kSilu>(values, n);
  return activate_all<kTanh>(values, n);
}

// LayerNorm of a row of n, whose vectors are whole; weight and bias are padded
void normalize_row(float* x, int64_t n, const float* weight, const float* bias, float eps) {
  Vec total = zero(), squares = zero();
  for (int64_t at = 0; at < n; at += kLanes) total = total + load_n(x + at, lanes_left(n, at));
  const Vec mean = set1(sum(total) / static_cast<float>(n));
  for (int64_t at = 0; at < n; at += kLanes) {
    const int left = lanes_left(n, at);
    const Vec apart = load_n(x + at, left) - mean;
    alignas(64) float lanes[kLanes] = {};
    store_n(lanes, apart, left);
    const Vec inside = load(lanes);
    squares = fma(inside, inside, squares);
  }
  const float variance = sum(squares) / static_cast<float>(n);
  const Vec by = set1(1.0f / __builtin_sqrtf(variance + eps));
  for (int64_t at = 0; at < n; at += kLanes) {
    store(x + at, fma((load(x + at) - mean) * by, load(weight + at), load(bias + at)));
  }
}

// y = x W^T in two chains per output, over the first and the second half of x, one row: twice as many sums under way
// hide the latency of a step that depends on the one before.
template <int V>
FASTDIFF_INLINE void two_chains(const Linear& low, const Linear& high, const float* x, float* y, int first) {
  Vec sums[2][V];
  for (int v = 0; v < V; v++) sums[0][v] = sums[1][v] = zero();
  const float* weight[2][V];
  for (int v = 0; v < V; v++) weight[0][v] = weight_vec(low, first + v), weight[1][v] = weight_vec(high, first + v);
  int k = 0;
  for (; k < low.n_in; k++) {
    const Vec by_low = set1(x[k]), by_high = set1(x[low.n_in + k]);
    for (int v = 0; v < V; v++) {
      sums[0][v] = fma(by_low, load(weight[0][v] + k * kPanel), sums[0][v]);
      sums[1][v] = fma(by_high, load(weight[1][v] + k * kPanel), sums[1][v]);
    }
  }
  for (; k < high.n_in; k++) {
    const Vec by_high = set1(x[low.n_in + k]);
    for (int v = 0; v < V; v++) sums[1][v] = fma(by_high, load(weight[1][v] + k * kPanel), sums[1][v]);
  }
  for (int v = 0; v < V; v++) store(y + (first + v) * kLanes, sums[0][v] + sums[1][v]);
}

void first_layer(const Linear& low, const Linear& high, const float* x, int64_t x_step, int rows, float* y, float* other,
                 int64_t y_step) {
  const int vecs = padded(low.n_out) / kLanes;
  if (rows == 1) {
    int v = 0;
    for (; v + 4 <= vecs; v += 4) two_chains<4>(low, high, x, y, v);
    for (; v < vecs; v++) two_chains<1>(low, high, x, y, v);
    return;
  }
  linear(low, x, x_step, rows, y, y_step);
  linear(high, x + low.n_in, x_step, rows, other, y_step);
  for (int row = 0; row < rows; row++) {
    for (int at = 0; at < vecs * kLanes; at += kLanes) {
      store(y + row * y_step + at, load(y + row * y_step + at) + load(other + row * y_step + at));
    }
  }
}

// The network and its first layer's shares that are the same at each step.
struct Network {
  Linear low, high, layers[kMlpLayers];
  const float *norm_weight, *norm_bias;
};

Network unpack(const MlpLoopArgs& args) {
  Network net;
  const int dim = static_cast<int>(args.widths[0]), split = static_cast<int>(mlp_split(dim));
  const float* at = args.weights;
  const int hidden = static_cast<int>(args.widths[1]);
  net.low = {at, nullptr, split, hidden};
  at += static_cast<int64_t>(padded(hidden)) * split;
  net.high = {at, nullptr, dim - split, hidden};
  at += static_cast<int64_t>(padded(hidden)) * (dim - split);
  for (int i = 0; i < args.layers; i++) {
    const int n_in = static_cast<int>(args.widths[i + 1]), n_out = static_cast<int>(args.widths[i + 2]);
    const float* bias = at + static_cast<int64_t>(padded(n_out)) * n_in;
    net.layers[i] = {at, bias, n_in, n_out};
    at = bias + padded(n_out);
  }
  net.norm_weight = at;
  net.norm_bias = at + padded(dim);
  return net;
}

}  // namespace

void denoise_mlp_loop(const MlpLoopArgs& args) {
  const Network net = unpack(args);
  const bool guided = args.uncond != nullptr;
  const int rows = args.rows, branches = guided ? 2 : 1;
  const int64_t dim = args.widths[0], hidden_dim = args.widths[1];
  const MlpLayout lay = mlp_layout(args.widths, args.layers, rows, guided, args.steps, kMlpNoise);
  float* const state = args.scratch + lay.state;
  float* const cond = args.scratch + lay.cond;
  float* const uncond = args.scratch + lay.uncond;
  float* const time = args.scratch + lay.time;
  float* const made = args.scratch + lay.noise;
  const PhiloxKeys keys = philox_keys(args.seed);
  const Vec scale = set1(args.guidance_scale);

  for (int row = 0; row < rows; row++) {
    copy_row(args.cond + row * hidden_dim, hidden_dim, cond + row * lay.wide, lay.wide);
    if (guided) copy_row(args.uncond + row * args.uncond_step, hidden_dim, uncond + row * lay.wide, lay.wide);
    const float* start = args.x_t + row * dim;
    if (args.x_t == nullptr) {
      fill_normals(keys, args.row_key + row, args.sample + row, 1, 0, 1, 0, static_cast<int>(dim), made, lay.normals);
      start = made;
    }
    copy_row(start, dim, state + row * lay.dim, lay.dim);
  }

  int64_t noise_end = args.steps;  // behind the last step that draws
  while (noise_end > 0 && args.coef[3 * noise_end - 1] == 0.0) noise_end--;
  int64_t made_from = 0, made_to = 0;  // the steps whose normals are in `made`
  for (int64_t step = 0; step < args.steps; step++) {
    const Vec c_out = set1(static_cast<float>(args.coef[3 * step]));
    const Vec c_xt = set1(static_cast<float>(args.coef[3 * step + 1]));
    const float noise_factor = static_cast<float>(args.coef[3 * step + 2]);
    const Vec c_noise = set1(noise_factor);
    const float* noise = nullptr;
    int64_t noise_step = dim;
    if (args.coef[3 * step + 2] != 0.0) {
      if (args.noise != nullptr) {
        noise = args.noise + step * args.noise_step;
      } else {
        if (step >= made_to) {
          made_from = step;
          made_to = step + lay.ahead < noise_end ? step + lay.ahead : noise_end;
          fill_normals(keys, args.row_key, args.sample, rows, static_cast<uint32_t>(1 + step),
                       static_cast<int>(made_to - made_from), 0, static_cast<int>(dim), made, lay.normals);
        }
        noise = made + (step - made_from) * rows * lay.normals;
        noise_step = lay.normals;
      }
    }

    // the denoiser
    float* hidden = args.scratch + lay.hidden;
    float* other = args.scratch + lay.other;
    first_layer(net.low, net.high, state, lay.dim, rows, hidden, other, lay.wide);
    const float* step_time = args.time + step * hidden_dim;
    if (hidden_dim % kLanes != 0) {
      copy_row(step_time, hidden_dim, time, lay.wide);
      step_time = time;
    }
    const int64_t hidden_end = (hidden_dim + kLanes - 1) / kLanes * kLanes;
    for (int row = 0; row < rows; row++) {
      float* h = hidden + row * lay.wide;
      for (int64_t at = 0; at < hidden_end; at += kLanes) {
        const Vec x = load(h + at), t = load(step_time + at);
        if (guided) store(h + rows * lay.wide + at, (x + load(uncond + row * lay.wide + at)) + t);
        store(h + at, (x + load(cond + row * lay.wide + at)) + t);
      }
    }
    for (int i = 0; i < args.layers; i++) {
      for (int row = 0; row < branches * rows; row++) {
        activate_all(args.activation, hidden + row * lay.wide, padded(net.layers[i].n_in));
      }
      linear(net.layers[i], hidden, lay.wide, branches * rows, other, lay.wide);
      float* const swap = hidden;
      hidden = other;
      other = swap;
    }
    if (args.norm_eps >= 0.0f) {
      for (int row = 0; row < branches * rows; row++) {
        normalize_row(hidden + row * lay.wide, dim, net.norm_weight, net.norm_bias, args.norm_eps);
      }
    }

    // the update
    for (int row = 0; row < rows; row++) {
      const float* c = hidden + row * lay.wide;
      const float* u = c + rows * lay.wide;
      float* x = state + row * lay.dim;
      Vec squares = zero();
      for (int64_t at = 0; at < dim; at += kLanes) {
        Vec output = load(c + at);
        if (guided) output = fma(scale, output - load(u + at), load(u + at));
        Vec x_prev = c_out * output;
        if (args.coef[3 * step + 1] != 0.0) x_prev = fma(c_xt, load(x + at), x_prev);
        if (noise != nullptr) x_prev = fma(c_noise, load_n(noise + row * noise_step + at, lanes_left(dim, at)), x_prev);
        store(x + at, x_prev);
      }
      if (!args.normalize) continue;
      for (int64_t at = 0; at < dim; at += kLanes) {
        const Vec part = load_n(x + at, lanes_left(dim, at));
        squares = fma(part, part, squares);
      }
      float norm = __builtin_sqrtf(sum(squares));
      if (norm < 1e-12f) norm = 1e-12f;
      for (int64_t at = 0; at < dim; at += kLanes) store(x + at, load(x + at) / set1(norm));
    }
  }
  for (int row = 0; row < rows; row++) {
    for (int64_t at = 0; at < dim; at += kLanes) {
      store_n(args.x_0 + row * dim + at, load(state + row * lay.dim + at), lanes_left(dim, at));
    }
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
