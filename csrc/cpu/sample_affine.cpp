#include "sample_affine.h"

#include "../step_noise.h"
#include "../tensors.h"
#include "scratch.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor sample_affine(const Tensor& cond, const MaybeTensor& uncond, double guidance_scale, const Tensor& weights,
                     const MaybeTensor& z, int64_t seed, const MaybeTensor& row_key, const MaybeTensor& sample) {
  constexpr const char* op = "sample_affine";
  const Tensor conds = floats(op, "cond", cond, {-1, -1});
  const int64_t rows = conds.size(0), dim = conds.size(1), whole = (dim + 15) / 16 * 16;
  FASTDIFF_CHECK(dim > 0 && dim < (1 << 16), op, ": cond must be [R, D] with D in 1 .. 2^16 - 1 (got ", shape_of(cond), ")");
  const bool guided = uncond.has_value();
  const Tensor unconds = guided ? floats(op, "uncond", *uncond, {-1, dim}) : conds;
  const int64_t uncond_rows = unconds.size(0), uncond_step = uncond_rows == 1 ? 0 : dim;
  FASTDIFF_CHECK(uncond_rows == rows || uncond_rows == 1, op, ": uncond must have 1 or ", rows, " rows (got ",
                 uncond_rows, ")");
  const Tensor packed = floats(op, "weights", weights, {whole * (2 * dim + 1)});
  const bool given = z.has_value();
  const StepNoise made(op, std::nullopt, row_key, sample, rows, dim);
  FASTDIFF_CHECK(given != made.keyed(), op, ": give z, or row_key and sample");
  const Tensor draws = given ? floats(op, "z", *z, {rows, dim}) : conds;
  Tensor x_0 = empty_like_with(conds, {rows, dim}, ScalarType::Float);
  if (rows == 0) return x_0;
  const int64_t per_task =
      rows_per_task(rows, static_cast<double>(2 * whole * dim + 64 * dim), num_threads(), kAffineRows, 3e5);
  const auto kernel = FASTDIFF_PICK(sample_affine);
  parallel(num_threads(), (rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task;
    kernel({data<float>(packed), data<float>(conds) + first * dim,
            guided ? data<float>(unconds) + first * uncond_step : nullptr, uncond_step,
            static_cast<float>(guidance_scale), given ? data<float>(draws) + first * dim : nullptr,
            static_cast<uint64_t>(seed), given ? nullptr : made.row_key() + first,
            given ? nullptr : made.sample() + first, static_cast<int>(std::min(per_task, rows - first)),
            static_cast<int>(dim), scratch(affine_scratch(dim)), mutable_data<float>(x_0) + first * dim});
  });
  return x_0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("sample_affine", TORCH_BOX(&sample_affine)); }

}  // namespace fastdiff
