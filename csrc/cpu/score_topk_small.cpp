// Few queries of a small table: scores into memory, then what may count among them (score_topk_rows.h).
#include <algorithm>

#include "score_topk_exact.h"
#include "score_topk_order.h"
#include "score_topk_queries.h"
#include "score_topk_rows.h"
#include "score_topk_scan.h"
#include "scratch.h"

namespace fastdiff {
namespace topk {

void scan_small(const Search& search, const Way& way, const Allowed& allowed, const std::vector<int64_t>& which,
                double largest_norm, Report& report) {
  const Prepared prepared(search, which, way.product, way.table.stored, way.residual, largest_norm);
  const int64_t padded = round_up(way.table.n_rows, kStretch), n_groups = padded / 16, dim = way.table.dim;
  float* const memory = scratch(2 * padded + 2 * n_groups + kBlock * dim);
  RowsArgs args;
  args.table = way.table;
  args.product = way.product;
  args.queries = prepared.view();
  args.allowed = allowed.bits.empty() ? nullptr : allowed.bits.data();
  args.scores = memory;
  args.rows = reinterpret_cast<int32_t*>(memory + padded);
  args.low = memory + 2 * padded;
  args.scratch = args.low + 2 * n_groups;
  float* const some = args.low + n_groups;
  std::vector<uint64_t> keys;
  for (size_t i = 0; i < which.size(); i++) {
    args.query = static_cast<int64_t>(i);
    FASTDIFF_PICK_ALL(topk_row_scores)(args);
    if (search.exclude.offsets != nullptr) {
      for (int64_t at = search.exclude.offsets[which[i]]; at < search.exclude.offsets[which[i] + 1]; at++) {
        args.scores[search.exclude.values[at]] = -kInfinity;
      }
    }
    FASTDIFF_PICK_ALL(topk_row_floors)(args);
    int64_t n_some = 0;
    const int64_t apart = n_groups >= 32 * search.k ? n_groups / 4 : n_groups;  // where there are plenty, four in one
    for (int64_t group = 0; group < apart; group++) {
      float low = args.low[group];
      for (int64_t other = group + apart; other < n_groups; other += apart) low = std::max(low, args.low[other]);
      some[n_some] = low;
      n_some += low > -kInfinity;
    }
    const float floor = n_some < search.k ? -kInfinity : FASTDIFF_PICK(topk_floor)(some, n_some, search.k);
    const int64_t n = FASTDIFF_PICK_ALL(topk_rows_reaching)(args, floor);
    ExactArgs exact;
    exact.query = search.queries + which[i] * dim;
    exact.items = search.items.chunks[0];
    exact.row_bytes = search.items.row_bytes;
    exact.dim = dim;
    exact.rows = args.rows;
    exact.first = 0;
    exact.n = n;
    exact.scores = args.scores;
    exact.scratch = args.scratch;
    FASTDIFF_PICK(topk_exact)(exact);
    keys.resize(static_cast<size_t>(n));
    for (int64_t j = 0; j < n; j++) {
      keys[static_cast<size_t>(j)] = to_key(args.scores[j], static_cast<uint32_t>(args.rows[j]));
    }
    answer(search, which[i], keys);
    report.rescored += n;
  }
}

}  // namespace topk
}  // namespace fastdiff
