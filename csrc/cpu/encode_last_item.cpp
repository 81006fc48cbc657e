#include "encode_last_item.h"

#include <atomic>

#include "../history_tensors.h"
#include "scratch.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor encode_last_item(const Tensor& items, const Tensor& lengths, const Tensor& item_table, const Tensor& weights,
                        int64_t window, int64_t outputs, int64_t pad_id, double eps) {
  constexpr const char* op = "encode_last_item";
  const HistoryTensors given(op, items, lengths, item_table);
  const int64_t rows = given.users, n = given.places, dim = given.dim, whole = (dim + 15) / 16 * 16;
  FASTDIFF_CHECK(dim > 0 && dim < (1 << 16) && window > 0, op, ": item_table must be [N, D] with D in 1 .. 2^16 - 1 (got ",
                 shape_of(item_table), ")");
  FASTDIFF_CHECK(outputs >= 0 && outputs < (1 << 18), op, ": outputs must be in 0 .. 2^18 - 1 (got ", outputs, ")");
  const int64_t head = (outputs + 15) / 16 * 16, width = outputs > 0 ? outputs : dim;
  const Tensor packed = floats(op, "weights", weights, {whole * (4 * (dim + 1) + 8 + window) + head * (dim + 1)});
  Tensor h = empty_like_with(given.table, {rows, width}, ScalarType::Float);
  if (rows == 0) return h;
  const double work = static_cast<double>(whole * (4 * dim + 6 * n + 100) + head * dim);
  const int64_t per_task = rows_per_task(rows, work, num_threads(), kEncodeRows, 1e6);
  const auto kernel = FASTDIFF_PICK(encode_last_item);
  std::atomic<bool> fits{true};
  parallel(num_threads(), (rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task;
    if (!kernel({data<int64_t>(given.items) + first * n, data<int64_t>(given.lengths) + first, n,
                 data<float>(given.table), given.table_rows, data<float>(packed), static_cast<int>(window),
                 static_cast<int>(dim), static_cast<int>(outputs), pad_id, static_cast<float>(eps),
                 static_cast<int>(std::min(per_task, rows - first)), scratch(encode_scratch(dim, n, outputs)),
                 mutable_data<float>(h) + first * width})) {
      fits.store(false);
    }
  });
  FASTDIFF_CHECK(fits.load(), op, ": items must be rows of the table, 0 .. ", given.table_rows - 1,
                 ", and lengths in 0 .. ", std::min(n, window));
  return h;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("encode_last_item", TORCH_BOX(&encode_last_item)); }

}  // namespace fastdiff
