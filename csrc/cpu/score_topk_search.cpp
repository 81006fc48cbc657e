#include "score_topk_search.h"

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "score_topk_definition.h"
#include "score_topk_exact.h"
#include "score_topk_order.h"
#include "score_topk_queries.h"
#include "score_topk_scan.h"
#include "thread_pool.h"

namespace fastdiff {
namespace topk {
namespace {

constexpr double kLargest = 0x1p126;      // scores below this cannot overflow float32 on the way
constexpr double kLargestByFloat16 = 0x1p100;  // queries below this cannot with rows that are yet to be scaled
constexpr int64_t kWidest = 1 << 16;      // wider vectors are scored by the definition: the bounds would be loose
constexpr int64_t kFewRows = 256;         // tables up to this size are scored by the definition
constexpr int64_t kSmallTable = 1 << 15;  // few queries have all their scores in memory where the table is this small,
constexpr int64_t kSmallBytes = 2 << 20;  // also in bytes: one thread reads it from its second-level cache

void check_lists(const char* name, const Lists& lists, int64_t n_queries, int64_t n_rows) {
  if (lists.offsets == nullptr) return;
  const int64_t total = lists.offsets[n_queries];
  uint64_t largest = 0;
  for (int64_t i = 0; i < total; i++) largest = std::max(largest, static_cast<uint64_t>(lists.values[i]));
  if (largest < static_cast<uint64_t>(n_rows)) return;
  const auto bounds = std::minmax_element(lists.values, lists.values + total);
  fail("score_topk: ", name, " must hold rows 0..", n_rows - 1, " (got ",
       *bounds.first < 0 ? *bounds.first : *bounds.second, ")");
}

}  // namespace

void search(const Search& search, Report* report) {
  Report ignored;
  Report& counts = report == nullptr ? ignored : *report;
  const int64_t n = search.n_queries, n_rows = search.scan.n_rows, dim = search.scan.dim;
  check_lists("user_exclude", search.exclude, n, n_rows);
  check_lists("user_candidates", search.candidates, n, n_rows);
  if (n == 0 || n_rows == 0) {
    std::fill(search.rows, search.rows + n * search.k, -1);
    std::fill(search.scores, search.scores + n * search.k, -kInfinity);
    return;
  }
  const int64_t n_blocks = (n_rows + kBlock - 1) / kBlock;
  float largest_norm = 0.0f;
  for (int64_t block = 0; block < n_blocks; block++)
    largest_norm = std::max(largest_norm, search.scan.bounds[block].norm);

  std::vector<int64_t> in_range, out_of_range;
  for (int64_t query = 0; query < n; query++) {
    const float* at = search.queries + query * dim;
    double sum = 0.0;
    for (int64_t i = 0; i < dim; i++) sum += static_cast<double>(at[i]) * static_cast<double>(at[i]);
    if (!(sum <= std::numeric_limits<double>::max())) {
      fail("score_topk: query must be finite (got NaN or infinity in query[", query, "]); check the model's weights");
    }
    const double norm = std::sqrt(sum), size = std::max(norm, 1.0) * std::max(static_cast<double>(largest_norm), 1.0);
    const bool scans = size < kLargest && (search.scan.stored != Stored::float16 || norm < kLargestByFloat16);
    (scans ? in_range : out_of_range).push_back(query);
  }

  const Allowed allowed(search);
  if (search.candidates.offsets != nullptr) return of_candidates(search, allowed);
  if (n_rows <= kFewRows || search.k > n_rows / 8 || dim > kWidest) {
    in_range.insert(in_range.end(), out_of_range.begin(), out_of_range.end());
    counts.by_definition += n;
    return by_definition(search, allowed, in_range);
  }

  // where few rows are allowed, only those are read; they are gathered as float32, which no scale of a block concerns
  std::vector<int32_t> few;
  Table items = search.items;
  items.bounds = search.scan.bounds;
  const bool gather = 4 * allowed.count <= n_rows;
  if (gather) few = allowed.rows();
  const Table& table = gather ? items : search.scan;
  const int64_t n_scanned = static_cast<int64_t>(in_range.size());
  const bool small = n_rows <= kSmallTable && n_rows * table.row_bytes <= kSmallBytes && !gather;
  const Few few_queries = n_scanned > kFewQueries ? Few::no : small ? Few::queries_of_small_table : Few::queries;
  const Product product = product_for(table, few_queries);
  // whether the bounds know what the rows lose in the product: those of scaled rows know nothing of float32 rows
  const bool residual = !is_scaled(search.scan.stored) || table.stored == search.scan.stored;
  const Way first{table, product, residual, gather ? &few : nullptr};
  std::vector<int64_t> left;
  if (few_queries == Few::queries_of_small_table) {
    scan_small(search, first, allowed, in_range, largest_norm, counts);
  } else {
    left = scan_all(search, first, allowed, in_range, largest_norm, true, counts);
  }
  counts.scanned += static_cast<int64_t>(in_range.size());
  if (!left.empty() && !(product == Product::float32 && table.stored == Stored::float32)) {
    const Way second{items, Product::float32, residual, gather ? &few : nullptr};
    counts.scanned_again += static_cast<int64_t>(left.size());
    left = scan_all(search, second, allowed, left, largest_norm, true, counts);
  }
  left.insert(left.end(), out_of_range.begin(), out_of_range.end());
  counts.by_definition += static_cast<int64_t>(left.size());
  if (!left.empty()) by_definition(search, allowed, left);
}

void pack(const char* items, int64_t row_bytes, int64_t dim, int64_t n_rows, Stored stored, char* rows, Bound* bounds,
          int threads) {
  const auto kernel = FASTDIFF_PICK(topk_pack);
  const int64_t element = bytes_of(stored);
  const int64_t per_task = round_up(std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, dim)), kBlock);
  parallel(threads, (n_rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task;
    PackArgs args;
    args.items = items + first * row_bytes;
    args.row_bytes = row_bytes;
    args.dim = dim;
    args.n_rows = std::min(per_task, n_rows - first);
    args.stored = stored;
    args.rows = rows == nullptr ? nullptr : rows + first * dim * element;
    args.bounds = bounds + first / kBlock;
    kernel(args);
  });
}

}  // namespace topk
}  // namespace fastdiff
