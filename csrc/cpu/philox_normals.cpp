#include "philox_normals.h"

#include "../tensors.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor philox_normals(int64_t seed, const Tensor& row_key, const Tensor& sample, int64_t first_draw, int64_t n_draws,
                      int64_t dim) {
  constexpr const char* op = "philox_normals";
  const Tensor keys = checked(op, "row_key", row_key, ScalarType::Long, {-1});
  const int64_t rows = keys.size(0);
  const Tensor samples = checked(op, "sample", sample, ScalarType::Long, {rows});
  FASTDIFF_CHECK(dim >= 0 && dim <= (1 << 18), op, ": dim must be in 0 .. 2^18 (got ", dim, ")");
  constexpr int64_t kDraws = int64_t{1} << 32;
  FASTDIFF_CHECK(first_draw >= 0 && n_draws >= 0 && first_draw <= kDraws && n_draws <= kDraws - first_draw, op,
                 ": draws must be numbered from 0 to 2^32 - 1 (got ", first_draw, " and ", n_draws, " of them)");
  Tensor normals = empty_like_with(keys, {n_draws, rows, dim}, ScalarType::Float);
  if (rows == 0 || dim == 0) return normals;

  const int64_t per_task = std::max<int64_t>(1, std::min<int64_t>(rows, (1 << 14) / dim));  // some ten microseconds
  const int64_t tasks_per_draw = (rows + per_task - 1) / per_task;
  const auto kernel = FASTDIFF_PICK(philox_normals);
  parallel(num_threads(), n_draws * tasks_per_draw, [&](int64_t task) {
    const int64_t draw = task / tasks_per_draw, first = task % tasks_per_draw * per_task;
    kernel({static_cast<uint64_t>(seed), data<int64_t>(keys) + first, data<int64_t>(samples) + first,
            static_cast<uint32_t>(first_draw + draw), std::min(per_task, rows - first), static_cast<int>(dim),
            mutable_data<float>(normals) + (draw * rows + first) * dim});
  });
  return normals;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("philox_normals", TORCH_BOX(&philox_normals)); }

}  // namespace fastdiff
