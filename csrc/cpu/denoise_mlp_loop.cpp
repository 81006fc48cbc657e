#include "denoise_mlp_loop.h"

#include "../step_noise.h"
#include "../tensors.h"
#include "denoise_mlp_loop_layout.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

constexpr const char* op = "denoise_mlp_loop";

int64_t packed_size(const MlpShape& shape, bool norm) {
  const int64_t* const widths = shape.widths;
  int64_t size = mlp_padded(widths[1]) * widths[0];
  for (int i = 2; i < shape.layers + 2; i++) size += mlp_padded(widths[i]) * (widths[i - 1] + 1);
  return size + (norm ? 2 * mlp_padded(widths[0]) : 0);
}

// What the header of a network says.
MlpShape shape_of_network(const Tensor& network, int64_t dim) {
  FASTDIFF_CHECK(network.size(0) >= kMlpHeader, op, ": network must begin with its header of ", kMlpHeader, " floats");
  const float* const header = data<float>(network);
  MlpShape shape = {};
  FASTDIFF_CHECK(header[0] >= 0 && header[0] <= kMlpLayers, op, ": the network may have 1 to ", kMlpLayers + 1,
                 " layers (got ", header[0] + 1, ")");
  FASTDIFF_CHECK(header[1] >= kGelu && header[1] <= kTanh, op, ": no activation has the number ", header[1]);
  shape.layers = static_cast<int>(header[0]);
  shape.activation = static_cast<int>(header[1]);
  shape.norm_eps = header[2];
  for (int i = 0; i < shape.layers + 2; i++) {
    const float width = header[3 + i];
    FASTDIFF_CHECK(width > 0 && width < (1 << 18), op, ": widths must be in 1 .. 2^18 - 1 (got ", width, ")");
    shape.widths[i] = static_cast<int64_t>(width);
  }
  FASTDIFF_CHECK(shape.widths[0] == dim && shape.widths[shape.layers + 1] == dim, op,
                 ": the network must return what it reads, [R, ", dim, "] (got ", shape.widths[0], " to ",
                 shape.widths[shape.layers + 1], ")");
  const int64_t size = kMlpHeader + packed_size(shape, shape.norm_eps >= 0);
  FASTDIFF_CHECK(network.size(0) == size, op, ": network must have shape [", size, "] (got ", shape_of(network), ")");
  return shape;
}

// Rows per task: few enough for every thread to have as many tasks as any other, and enough work to be worth a thread.
int64_t rows_per_task(int64_t rows, int64_t steps, int64_t weights, int threads) {
  const double work = static_cast<double>(rows) * static_cast<double>(steps) * (static_cast<double>(weights) + 4096.0);
  const int64_t worth = std::max<int64_t>(1, static_cast<int64_t>(work / 1e6));  // about 20 us each
  const int64_t used = std::min<int64_t>(threads, worth);
  const int64_t rounds = (rows + used * kMlpRows - 1) / (used * kMlpRows);
  return std::max<int64_t>(1, (rows + used * rounds - 1) / (used * rounds));
}

Tensor denoise_mlp_loop(const MaybeTensor& x_t, const Tensor& network, const Tensor& steps_table, int64_t dim,
                        const Tensor& cond, const MaybeTensor& uncond, double guidance_scale, const MaybeTensor& noise,
                        int64_t seed, const MaybeTensor& row_key, const MaybeTensor& sample) {
  const Tensor packed = floats(op, "network", network, {-1});
  const MlpShape shape = shape_of_network(packed, dim);
  const int64_t hidden = shape.widths[1];
  const bool guided = uncond.has_value(), two_branches = guided && !mlp_is_linear(shape.layers, shape.norm_eps);
  const Tensor conds = floats(op, "cond", cond, {-1, hidden});
  const int64_t rows = conds.size(0);
  const Tensor unconds = guided ? floats(op, "uncond", *uncond, {-1, hidden}) : conds;
  const int64_t uncond_rows = unconds.size(0);
  FASTDIFF_CHECK(uncond_rows == rows || uncond_rows == 1, op, ": uncond must have 1 or ", rows, " rows (got ",
                 uncond_rows, ")");
  const int64_t table_row = kMlpFactors + mlp_padded(hidden);
  const Tensor table = floats(op, "steps", steps_table, {-1, table_row});
  const int64_t steps = table.size(0);
  const float* const rows_of_table = data<float>(table);
  const Tensor start = x_t.has_value() ? floats(op, "x_t", *x_t, {rows, dim}) : conds;
  const StepNoise draws(op, noise, row_key, sample, rows, dim);
  FASTDIFF_CHECK(x_t.has_value() || draws.keyed(), op, ": x_t must be given where the noise is not drawn here");
  draws.check_steps(steps, [&](int64_t i) { return rows_of_table[i * table_row + kFactorNoise]; });

  Tensor x_0 = empty_like_with(conds, {rows, dim}, ScalarType::Float);
  if (rows == 0) return x_0;
  const int threads = num_threads();
  const int64_t per_task = rows_per_task(rows, steps, packed_size(shape, false), threads);
  const MlpLayout layout = mlp_layout(shape.widths, shape.layers, per_task, two_branches, steps, kMlpNoise);
  const auto kernel = FASTDIFF_PICK(denoise_mlp_loop);
  parallel(threads, (rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task, here = std::min(per_task, rows - first);
    // a last, smaller block makes its noise further ahead, in the same memory
    static thread_local std::vector<float> scratch;
    const MlpLayout needed = mlp_layout(shape.widths, shape.layers, here, two_branches, steps, kMlpNoise);
    scratch.resize(static_cast<size_t>(std::max(layout.total, needed.total)) + 16);
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    MlpLoopArgs args = {};
    args.shape = shape;
    args.weights = data<float>(packed) + kMlpHeader;
    args.x_t = x_t.has_value() ? data<float>(start) + first * dim : nullptr;
    args.cond = data<float>(conds) + first * hidden;
    args.uncond_step = uncond_rows == 1 ? 0 : hidden;
    args.uncond = guided ? data<float>(unconds) + first * args.uncond_step : nullptr;
    args.guidance_scale = static_cast<float>(guidance_scale);
    args.table = rows_of_table;
    args.steps = steps;
    args.noise = draws.given() != nullptr ? draws.given() + first * dim : nullptr;
    args.noise_step = rows * dim;
    args.seed = static_cast<uint64_t>(seed);
    args.row_key = draws.keyed() ? draws.row_key() + first : nullptr;
    args.sample = draws.keyed() ? draws.sample() + first : nullptr;
    args.rows = static_cast<int>(here);
    args.scratch = aligned;
    args.x_0 = mutable_data<float>(x_0) + first * dim;
    kernel(args);
  });
  return x_0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("denoise_mlp_loop", TORCH_BOX(&denoise_mlp_loop)); }

}  // namespace fastdiff
