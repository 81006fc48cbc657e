#include "row_linear.h"

#include "../tensors.h"
#include "scratch.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor row_linear(const Tensor& x, const Tensor& weights, int64_t n_out) {
  constexpr const char* op = "row_linear";
  const Tensor rows_in = floats(op, "x", x, {-1, -1});
  const int64_t rows = rows_in.size(0), n_in = rows_in.size(1), whole = (n_out + 15) / 16 * 16;
  FASTDIFF_CHECK(n_out > 0 && n_in < (1 << 20) && n_out < (1 << 20), op, ": n_out must be in 1 .. 2^20 - 1 (got ", n_out, ")");
  const Tensor packed = floats(op, "weights", weights, {whole * (n_in + 1)});
  Tensor y = empty_like_with(rows_in, {rows, n_out}, ScalarType::Float);
  if (rows == 0) return y;
  const int64_t per_task = rows_per_task(rows, static_cast<double>(whole * n_in), num_threads(), 1024, 1e6);
  const auto kernel = FASTDIFF_PICK(row_linear);
  parallel(num_threads(), (rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task;
    kernel({data<float>(rows_in) + first * n_in, data<float>(packed), data<float>(packed) + whole * n_in,
            std::min(per_task, rows - first), static_cast<int>(n_in), static_cast<int>(n_out),
            whole == n_out ? nullptr : scratch(kLinearRows * whole), mutable_data<float>(y) + first * n_out});
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("row_linear", TORCH_BOX(&row_linear)); }

}  // namespace fastdiff
