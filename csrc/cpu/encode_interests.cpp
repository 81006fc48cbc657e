#include "encode_interests.h"

#include <atomic>

#include "../history_tensors.h"
#include "scratch.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor encode_interests(const Tensor& items, const Tensor& lengths, const Tensor& item_table,
                        const MaybeTensor& weights, int64_t window, int64_t hidden, int64_t interests, int64_t pad_id, bool positions_in_values) {
  constexpr const char* op = "encode_interests";
  const HistoryTensors given(op, items, lengths, item_table);
  const int64_t rows = given.users, n = given.places, dim = given.dim, whole = (dim + 15) / 16 * 16;
  const int64_t wide = (hidden + 15) / 16 * 16, columns = (interests + 15) / 16 * 16;
  FASTDIFF_CHECK(dim > 0 && dim < (1 << 16), op, ": item_table must be [N, D] with D in 1 .. 2^16 - 1 (got ",
                 shape_of(item_table), ")");
  FASTDIFF_CHECK(interests > 0 && interests < (1 << 16) && hidden >= 0 && hidden < (1 << 20) && window >= 0, op,
                 ": interests must be in 1 .. 2^16 - 1 (got ", interests, "), hidden below 2^20 (got ", hidden,
                 "), window not below 0 (got ", window, ")");
  const bool attends = weights.has_value();
  const int64_t wanted = wide * (dim + 1) + columns * (hidden + 1) + window * whole;
  const Tensor packed = attends ? floats(op, "weights", *weights, {wanted}) : given.table;
  Tensor g = empty_like_with(given.table, {rows, interests, dim}, ScalarType::Float);
  if (rows == 0) return g;
  const double of_a_place = static_cast<double>(wide * dim + columns * hidden + interests * dim + 20 * wide);
  const double work = attends ? static_cast<double>(n) * of_a_place : static_cast<double>(interests * dim);
  const int64_t per_task = rows_per_task(rows, work, num_threads(), kInterestUsers, 1e6);
  const auto kernel = FASTDIFF_PICK(encode_interests);
  std::atomic<bool> fits{true};
  parallel(num_threads(), (rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task, here = std::min(per_task, rows - first);
    EncodeInterestsArgs args = {};
    args.items = data<int64_t>(given.items) + first * n;
    args.lengths = data<int64_t>(given.lengths) + first;
    args.places = n;
    args.table = data<float>(given.table);
    args.table_rows = given.table_rows;
    args.weights = attends ? data<float>(packed) : nullptr;
    args.window = window;
    args.dim = static_cast<int>(dim);
    args.hidden = static_cast<int>(hidden);
    args.interests = static_cast<int>(interests);
    args.pad_id = pad_id;
    args.positions_in_values = positions_in_values;
    args.rows = static_cast<int>(here);
    args.scratch = attends ? scratch(interest_scratch(here, n, dim, hidden, interests)) : nullptr;
    args.g = mutable_data<float>(g) + first * interests * dim;
    if (!kernel(args)) fits.store(false);
  });
  FASTDIFF_CHECK(fits.load(), op, ": items must be rows of the table, 0 .. ", given.table_rows - 1,
                 ", and lengths in 0 .. ", attends ? std::min(n, window) : n);
  return g;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("encode_interests", TORCH_BOX(&encode_interests)); }

}  // namespace fastdiff
