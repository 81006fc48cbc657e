// levels: baseline avx2 avx512
#include "denoise_mlp_loop.h"

#include "denoise_mlp_loop_layout.h"
#include "linear.h"
#include "philox.h"
#include "rows.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

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
  const int64_t* const widths = args.shape.widths;
  const int dim = static_cast<int>(widths[0]), split = static_cast<int>(mlp_split(dim));
  const float* at = args.weights;
  const int hidden = static_cast<int>(widths[1]);
  net.low = {at, nullptr, split, hidden};
  at += static_cast<int64_t>(padded(hidden)) * split;
  net.high = {at, nullptr, dim - split, hidden};
  at += static_cast<int64_t>(padded(hidden)) * (dim - split);
  for (int i = 0; i < args.shape.layers; i++) {
    const int n_in = static_cast<int>(widths[i + 1]), n_out = static_cast<int>(widths[i + 2]);
    const float* bias = at + static_cast<int64_t>(padded(n_out)) * n_in;
    net.layers[i] = {at, bias, n_in, n_out};
    at = bias + padded(n_out);
  }
  net.norm_weight = at;
  net.norm_bias = at + padded(dim);
  return net;
}

// One step of a block of rows: its factors, and what it adds to x W^T. Rows of cond and noise are *_step apart.
struct Step {
  const float *cond, *time, *noise;  // noise: null where it is not read
  int64_t cond_step, noise_step;
  float c_out, c_xt, c_noise;
};

// The whole step of a linear denoiser, for R rows and V vectors of them: x_prev = c_out (x W^T + cond + time) + c_xt x +
// c_noise noise, with the sums in registers from the first product to the last term.
template <int R, int V>
FASTDIFF_INLINE void linear_step(const Network& net, const Step& step, const float* x, float* x_prev, int64_t x_step,
                                 int64_t dim, int first) {
  Vec low[R][V], high[R][V];
  const float* weight[2][V];
  for (int v = 0; v < V; v++) {
    weight[0][v] = weight_vec(net.low, first + v);
    weight[1][v] = weight_vec(net.high, first + v);
    for (int r = 0; r < R; r++) low[r][v] = high[r][v] = zero();
  }
  const int split = net.low.n_in, rest = net.high.n_in;
  const auto add = [&](Vec(&sums)[R][V], const float* const(&weights)[V], const float* inputs, int k) {
    Vec w[V];
    for (int v = 0; v < V; v++) w[v] = load(weights[v] + static_cast<int64_t>(k) * kPanel);
    for (int r = 0; r < R; r++) {
      const Vec by = set1(inputs[r * x_step + k]);
      for (int v = 0; v < V; v++) sums[r][v] = fma(by, w[v], sums[r][v]);
    }
  };
  if (R == 1) {  // both chains at once: alone, one would wait for itself
    for (int k = 0; k < split; k++) {
      add(low, weight[0], x, k);
      add(high, weight[1], x + split, k);
    }
    for (int k = split; k < rest; k++) add(high, weight[1], x + split, k);
  } else {
    for (int k = 0; k < split; k++) add(low, weight[0], x, k);
    for (int k = 0; k < rest; k++) add(high, weight[1], x + split, k);
  }
  const Vec c_out = set1(step.c_out), c_xt = set1(step.c_xt), c_noise = set1(step.c_noise);
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) {
      const int64_t at = static_cast<int64_t>(first + v) * kLanes;
      const Vec output = ((low[r][v] + high[r][v]) + load(step.cond + r * step.cond_step + at)) + load(step.time + at);
      Vec after = c_out * output;
      if (step.c_xt != 0.0f) after = fma(c_xt, load(x + r * x_step + at), after);
      if (step.noise != nullptr) {
        after = fma(c_noise, load_n(step.noise + r * step.noise_step + at, lanes_left(dim, at)), after);
      }
      store(x_prev + r * x_step + at, after);
    }
  }
}

template <int R, int V>
FASTDIFF_INLINE int linear_step_rows(const Network& net, const Step& step, const float* x, float* x_prev,
                                     int64_t x_step, int64_t dim, int rows, int row) {
  const int vecs = static_cast<int>((dim + kLanes - 1) / kLanes);
  for (; row + R <= rows; row += R) {
    Step here = step;
    here.cond += row * step.cond_step;
    if (step.noise != nullptr) here.noise += row * step.noise_step;
    const float* const from = x + row * x_step;
    float* const to = x_prev + row * x_step;
    int v = 0;
    for (; v + V <= vecs; v += V) linear_step<R, V>(net, here, from, to, x_step, dim, v);
    for (; v < vecs; v++) linear_step<R, 1>(net, here, from, to, x_step, dim, v);
  }
  return row;
}

void linear_step(const Network& net, const Step& step, const float* x, float* x_prev, int64_t x_step, int64_t dim,
                 int rows) {
  int row = linear_step_rows<kBlockRows, kBlockVecs>(net, step, x, x_prev, x_step, dim, rows, 0);
  row = linear_step_rows<2, kBlockVecs>(net, step, x, x_prev, x_step, dim, rows, row);
  linear_step_rows<1, 4>(net, step, x, x_prev, x_step, dim, rows, row);
}

// x / |x|; a norm under 1e-12 counts as 1e-12
FASTDIFF_INLINE void onto_sphere(float* x, int64_t dim) {
  Vec squares = zero();
  for (int64_t at = 0; at < dim; at += kLanes) {
    const Vec part = load_n(x + at, lanes_left(dim, at));
    squares = fma(part, part, squares);
  }
  float norm = __builtin_sqrtf(sum(squares));
  if (norm < 1e-12f) norm = 1e-12f;
  for (int64_t at = 0; at < dim; at += kLanes) store(x + at, load(x + at) / set1(norm));
}

}  // namespace

void denoise_mlp_loop(const MlpLoopArgs& args) {
  const Network net = unpack(args);
  const bool linear_only = mlp_is_linear(args.shape.layers, args.shape.norm_eps);
  const bool guided = args.uncond != nullptr && !linear_only;  // in two branches
  const int rows = args.rows, branches = guided ? 2 : 1;
  const int layers = args.shape.layers;
  const int64_t dim = args.shape.widths[0], hidden_dim = args.shape.widths[1];
  const MlpLayout lay = mlp_layout(args.shape.widths, layers, rows, guided, args.steps, kMlpNoise);
  float* state = args.scratch + lay.state;
  float* next = args.scratch + lay.hidden;  // of a linear denoiser: the state after the step
  float* const cond = args.scratch + lay.cond;
  float* const uncond = args.scratch + lay.uncond;
  float* const made = args.scratch + lay.noise;
  const PhiloxKeys keys = philox_keys(args.seed);
  const Vec scale = set1(args.guidance_scale);

  for (int row = 0; row < rows; row++) {
    const float* const of_row = args.cond + row * hidden_dim;
    const float* const without = args.uncond == nullptr ? nullptr : args.uncond + row * args.uncond_step;
    if (linear_only && without != nullptr) {
      guide_row(of_row, without, args.guidance_scale, hidden_dim, cond + row * lay.wide, lay.wide);
    } else {
      pad_row(of_row, hidden_dim, cond + row * lay.wide, lay.wide);
    }
    if (guided) pad_row(without, hidden_dim, uncond + row * lay.wide, lay.wide);
    const float* start = args.x_t + row * dim;
    if (args.x_t == nullptr) {
      fill_normals(keys, args.row_key + row, args.sample + row, 1, 0, 1, 0, static_cast<int>(dim), made, lay.normals);
      start = made;
    }
    pad_row(start, dim, state + row * lay.dim, lay.dim);
  }

  int64_t noise_end = args.steps;  // behind the last step that draws
  const int64_t table_row = kMlpFactors + mlp_padded(hidden_dim);
  while (noise_end > 0 && args.table[(noise_end - 1) * table_row + kFactorNoise] == 0.0f) noise_end--;
  int64_t made_from = 0, made_to = 0;  // the steps whose normals are in `made`
  for (int64_t step = 0; step < args.steps; step++) {
    const float* const factors = args.table + step * table_row;
    const float* const step_time = factors + kMlpFactors;
    const Vec c_out = set1(factors[kFactorOut]), c_xt = set1(factors[kFactorState]);
    const Vec c_noise = set1(factors[kFactorNoise]);
    const float* noise = nullptr;
    int64_t noise_step = dim;
    if (factors[kFactorNoise] != 0.0f) {
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

    float* hidden = args.scratch + lay.hidden;
    float* other = args.scratch + lay.other;
    for (int row = 0; factors[kSphereBefore] != 0.0f && row < rows; row++) onto_sphere(state + row * lay.dim, dim);
    if (linear_only) {
      linear_step(net, {cond, step_time, noise, lay.wide, noise_step, factors[kFactorOut], factors[kFactorState],
                        factors[kFactorNoise]}, state, next,
                  lay.dim, dim, rows);
      for (int row = 0; factors[kSphereAfter] != 0.0f && row < rows; row++) onto_sphere(next + row * lay.dim, dim);
      float* const swap = state;
      state = next;
      next = swap;
      continue;
    }

    // the denoiser
    first_layer(net.low, net.high, state, lay.dim, rows, hidden, other, lay.wide);
    const int64_t hidden_end = (hidden_dim + kLanes - 1) / kLanes * kLanes;
    for (int row = 0; row < rows; row++) {
      float* h = hidden + row * lay.wide;
      for (int64_t at = 0; at < hidden_end; at += kLanes) {
        const Vec x = load(h + at), t = load(step_time + at);
        if (guided) store(h + rows * lay.wide + at, (x + load(uncond + row * lay.wide + at)) + t);
        store(h + at, (x + load(cond + row * lay.wide + at)) + t);
      }
    }
    for (int i = 0; i < layers; i++) {
      for (int row = 0; row < branches * rows; row++) {
        activate_all(args.shape.activation, hidden + row * lay.wide, padded(net.layers[i].n_in));
      }
      linear(net.layers[i], hidden, lay.wide, branches * rows, other, lay.wide);
      float* const swap = hidden;
      hidden = other;
      other = swap;
    }
    if (args.shape.norm_eps >= 0.0f) {
      for (int row = 0; row < branches * rows; row++) {
        float* const h = hidden + row * lay.wide;
        layer_norm(h, dim, net.norm_weight, net.norm_bias, args.shape.norm_eps, h);
      }
    }

    // the update
    for (int row = 0; row < rows; row++) {
      const float* c = hidden + row * lay.wide;
      const float* u = c + rows * lay.wide;
      float* x = state + row * lay.dim;
      for (int64_t at = 0; at < dim; at += kLanes) {
        Vec output = load(c + at);
        if (guided) output = fma(scale, output - load(u + at), load(u + at));
        Vec x_prev = c_out * output;
        if (factors[kFactorState] != 0.0f) x_prev = fma(c_xt, load(x + at), x_prev);
        if (noise != nullptr) x_prev = fma(c_noise, load_n(noise + row * noise_step + at, lanes_left(dim, at)), x_prev);
        store(x + at, x_prev);
      }
      if (factors[kSphereAfter] != 0.0f) onto_sphere(x, dim);
    }
  }
  for (int row = 0; row < rows; row++) unpad_row(state + row * lay.dim, args.x_0 + row * dim, dim);
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
