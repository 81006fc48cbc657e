#include "score_topk_definition.h"

#include <algorithm>

#include "score_topk_order.h"
#include "thread_pool.h"

namespace fastdiff {
namespace topk {
namespace {

// Adds the rows first .. last - 1 that may be given to a query, keeping only what can be among its k best.
class Best {
 public:
  explicit Best(const Search& search) : search_(search), scratch_(16 * search.scan.dim) {
    limit_ = static_cast<size_t>(std::min(search.scan.n_rows, 2 * std::min(search.k, search.scan.n_rows) + 8192));
  }

  void add(int64_t query, const Denied* denied, const Allowed& allowed, int64_t first, int64_t last) {
    constexpr int64_t kStep = 1024;
    float scores[kStep];
    const auto exact = FASTDIFF_PICK(topk_exact);
    for (int64_t at = first; at < last; at += kStep) {
      ExactArgs args;
      args.query = search_.queries + query * search_.scan.dim;
      args.items = search_.items.chunks[0];
      args.row_bytes = search_.items.row_bytes;
      args.dim = search_.scan.dim;
      args.rows = nullptr;
      args.first = at;
      args.n = std::min(kStep, last - at);
      args.scores = scores;
      args.scratch = scratch_.get();
      exact(args);
      for (int64_t i = 0; i < args.n; i++) {
        const uint64_t key = to_key(scores[i], static_cast<uint32_t>(at + i));
        if (key < floor_ || !allowed.has(at + i)) continue;
        if (denied != nullptr && denied->has(static_cast<uint32_t>(at + i))) continue;
        if (keys.size() == limit_) shrink();
        if (key >= floor_) keys.push_back(key);
      }
    }
  }

  std::vector<uint64_t> keys;

 private:
  void shrink() {
    std::nth_element(keys.begin(), keys.begin() + search_.k - 1, keys.end(),
                     [](uint64_t a, uint64_t b) { return a > b; });
    keys.resize(static_cast<size_t>(search_.k));
    floor_ = keys.back();
  }

  const Search& search_;
  Aligned<float> scratch_;
  uint64_t floor_ = 0;
  size_t limit_;
};

}  // namespace

void Rescoring::write_of(int64_t query, const std::vector<int32_t>& rows) {
  scores_.resize(rows.size());
  ExactArgs args;
  args.query = search_.queries + query * search_.scan.dim;
  args.items = search_.items.chunks[0];
  args.row_bytes = search_.items.row_bytes;
  args.dim = search_.scan.dim;
  args.rows = rows.data();
  args.first = 0;
  args.n = static_cast<int64_t>(rows.size());
  args.scores = scores_.data();
  args.scratch = scratch_.get();
  exact_(args);
  keys_.resize(rows.size());
  for (size_t i = 0; i < rows.size(); i++) keys_[i] = to_key(scores_[i], static_cast<uint32_t>(rows[i]));
  answer(search_, query, keys_);
}

void by_definition(const Search& search, const Allowed& allowed, const std::vector<int64_t>& which) {
  const int64_t n = static_cast<int64_t>(which.size()), n_rows = search.scan.n_rows, threads = search.threads;
  const bool worth_threads = n * n_rows * search.scan.dim > 100000;
  // few queries: several threads for each
  const int64_t parts =
      !worth_threads || n >= 2 * threads ? 1 : std::min<int64_t>(threads, std::max<int64_t>(1, n_rows / 1024));
  const int64_t at_once = std::max<int64_t>(1, std::min(n, 4 * threads));
  for (int64_t start = 0; start < n; start += at_once) {
    const std::vector<int64_t> some(which.begin() + start, which.begin() + std::min(n, start + at_once));
    const DeniedRows denied(search, some);
    const int64_t here = static_cast<int64_t>(some.size());
    std::vector<std::vector<uint64_t>> found(static_cast<size_t>(here * parts));
    parallel(worth_threads ? search.threads : 1, here * parts, [&](int64_t task) {
      const int64_t i = task / parts, part = task % parts;
      Best best(search);
      const int64_t per_part = round_up((n_rows + parts - 1) / parts, 16), first = part * per_part;
      best.add(some[static_cast<size_t>(i)], denied.get() == nullptr ? nullptr : denied.get() + i, allowed, first,
               std::min(n_rows, first + per_part));
      if (parts == 1) return answer(search, some[static_cast<size_t>(i)], best.keys);
      best_first(best.keys, search.k);
      found[static_cast<size_t>(task)] = std::move(best.keys);
    });
    if (parts == 1) continue;
    for (int64_t i = 0; i < here; i++) {
      std::vector<uint64_t>& keys = found[static_cast<size_t>(i * parts)];
      for (int64_t part = 1; part < parts; part++) {
        std::vector<uint64_t>& more = found[static_cast<size_t>(i * parts + part)];
        keys.insert(keys.end(), more.begin(), more.end());
        std::vector<uint64_t>().swap(more);
      }
      answer(search, some[static_cast<size_t>(i)], keys);
      std::vector<uint64_t>().swap(keys);
    }
  }
}

void of_candidates(const Search& search, const Allowed& allowed) {
  const int64_t n = search.n_queries, total = search.candidates.offsets[n];
  const int64_t per_task = std::max<int64_t>(1, n / 64);
  const int threads = total * search.scan.dim > 50000 ? search.threads : 1;
  parallel(threads, (n + per_task - 1) / per_task, [&](int64_t task) {
    Rescoring best(search);
    std::vector<int32_t> rows;
    for (int64_t query = task * per_task; query < std::min(n, (task + 1) * per_task); query++) {
      const DeniedRows denied(search, {query});
      const Denied* none = denied.get();
      rows.clear();
      for (int64_t i = search.candidates.offsets[query]; i < search.candidates.offsets[query + 1]; i++) {
        const int64_t row = search.candidates.values[i];
        if (!allowed.has(row)) continue;
        if (none != nullptr && none->has(static_cast<uint32_t>(row))) continue;
        rows.push_back(static_cast<int32_t>(row));
      }
      std::sort(rows.begin(), rows.end());
      rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
      best.write_of(query, rows);
    }
  });
}

}  // namespace topk
}  // namespace fastdiff
