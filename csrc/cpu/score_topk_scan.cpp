#include "score_topk_scan.h"

#include <algorithm>
#include <cmath>

#include "score_topk_definition.h"
#include "score_topk_kept.h"
#include "score_topk_queries.h"
#include "thread_pool.h"

namespace fastdiff {
namespace topk {
namespace {

constexpr int64_t kBufferBytes = 32 << 20;  // for what scans keep, all threads and queries together

// Tables of at least this many blocks are first sampled: one block of kStride.
constexpr int64_t kSampledBlocks = 512, kStride = 32;

// The blocks in pieces, for the threads to take; with the sample only, or without it.
class Pieces {
 public:
  Pieces(int64_t n_blocks, int slots, bool sampled) : n_blocks_(n_blocks), sampled_(sampled) {
    const int64_t blocks = std::min<int64_t>(256, std::max<int64_t>(16, n_blocks / (8 * slots)));
    size_ = sampled ? round_up(blocks, kStride) : blocks;
  }
  int64_t of_sample() const { return (n_blocks_ + kStride * kStride - 1) / (kStride * kStride); }
  int64_t of_rest() const { return (n_blocks_ + size_ - 1) / size_; }

  template <class Run>  // run(first block, behind the last)
  void run_sample(int64_t piece, const Run& run) const {
    const int64_t end = std::min(n_blocks_, (piece + 1) * kStride * kStride);
    for (int64_t block = piece * kStride * kStride; block < end; block += kStride) run(block, block + 1);
  }

  template <class Run>
  void run_rest(int64_t piece, const Run& run) const {
    const int64_t end = std::min(n_blocks_, (piece + 1) * size_);
    if (!sampled_) return run(piece * size_, end);
    for (int64_t block = piece * size_; block < end; block += kStride) {
      if (block + 1 < end) run(block + 1, std::min(end, block + kStride));
    }
  }

 private:
  int64_t n_blocks_, size_;
  bool sampled_;
};

// A guess at the nanoseconds of a scan by one thread, to decide what is worth a second one.
int64_t cost_of_scan(const Search& search, Stored stored, int64_t n_rows, int64_t n_queries) {
  return n_rows * search.scan.dim * (bytes_of(stored) + n_queries / 8) / 24;
}

// How a query is left without an answer.
struct Left {
  std::vector<int64_t> guessed_wrong;  // the floor that the sample suggested was above the k-th best
  std::vector<int64_t> too_many;       // too many rows are within the bound
};

// Scans for the queries `which` and writes their answers.
//
// With `guess`, a large table is sampled first. The k-th best of the table is at about place k / kStride of the sample,
// so some places further down there is a score that more than k rows are likely to reach; only rows that may reach it
// are kept. Once the scan is over, k kept rows that surely reach it prove the guess right.
Left scan(const Search& search, const Way& way, const Allowed& allowed, const std::vector<int64_t>& which,
          int64_t capacity, double largest_norm, bool guess, Report& report) {
  const Prepared prepared(search, which, way.product, way.table.stored, way.residual, largest_norm);
  const DeniedRows denied(search, which);
  const int64_t n_rows = way.some == nullptr ? way.table.n_rows : static_cast<int64_t>(way.some->size());
  const int64_t n = static_cast<int64_t>(which.size()), n_blocks = (n_rows + kBlock - 1) / kBlock;
  const int64_t cost = cost_of_scan(search, way.table.stored, n_rows, n);
  const int slots = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(search.threads, cost / 20000)));
  guess = guess && n_blocks >= kSampledBlocks;
  const Pieces pieces(n_blocks, slots, guess);
  Job job(search, search.k, prepared.view(), denied.get(), capacity);
  std::vector<std::unique_ptr<Found>> found(static_cast<size_t>(slots));
  const auto kernel = FASTDIFF_PICK_ALL(topk_scan);
  const auto scan_pieces = [&](bool sample) {
    std::atomic<int64_t> next{0};
    const int64_t n_pieces = sample ? pieces.of_sample() : pieces.of_rest();
    parallel(slots, slots, [&](int64_t task) {
      auto& mine = found[static_cast<size_t>(task)];
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < n_pieces;) {
        if (mine == nullptr) mine = std::make_unique<Found>(job);
        for (int64_t q = 0; q < n; q++) mine->floor[q] = std::max(mine->floor[q], job.floors.get(q));
        const auto run = [&](int64_t first, int64_t last) {
          ScanArgs args;
          args.table = way.table;
          args.product = way.product;
          args.some = way.some == nullptr ? nullptr : way.some->data();
          args.n_some = way.some == nullptr ? 0 : static_cast<int64_t>(way.some->size());
          args.queries = job.queries;
          args.allowed = way.some != nullptr || allowed.bits.empty() ? nullptr : allowed.bits.data();
          args.first_block = first;
          args.last_block = last;
          args.slot = &mine->slot;
          kernel(args);
        };
        if (sample) {
          pieces.run_sample(piece, run);
        } else {
          pieces.run_rest(piece, run);
        }
      }
      for (int64_t q = 0; q < n && mine != nullptr; q++) mine->drop_denied(q);
    });
  };
  const auto lows = [&](int64_t q, std::vector<float>& low) {
    low.clear();
    for (const auto& slot : found) {
      if (slot == nullptr) continue;
      const Kept& kept = slot->kept[static_cast<size_t>(q)];
      low.insert(low.end(), kept.low, kept.low + kept.count);
    }
    return static_cast<int64_t>(low.size());
  };
  std::vector<float> guesses;
  if (guess) {
    const double expected = static_cast<double>(search.k) / kStride;
    job.k = static_cast<int64_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
    scan_pieces(true);
    guesses.assign(static_cast<size_t>(n), -kInfinity);
    std::vector<float> low;
    for (int64_t q = 0; q < n; q++) {
      if (lows(q, low) < job.k || job.given_up[static_cast<size_t>(q)].load(std::memory_order_relaxed)) continue;
      guesses[static_cast<size_t>(q)] =
          job.floors.raise(q, job.floor_of(low.data(), static_cast<int64_t>(low.size()), job.k));
    }
    job.k = search.k;
  }
  scan_pieces(false);

  std::atomic<int64_t> rescored{0};
  std::vector<char> wrong(static_cast<size_t>(n), 0);
  const int64_t per_task = std::max<int64_t>(1, std::min<int64_t>(16, n / (4 * slots)));
  parallel(slots, (n + per_task - 1) / per_task, [&](int64_t task) {
    Rescoring best(search);
    std::vector<float> low;
    std::vector<int32_t> rows;
    for (int64_t q = task * per_task; q < std::min(n, (task + 1) * per_task); q++) {
      if (job.given_up[static_cast<size_t>(q)].load(std::memory_order_relaxed)) continue;
      float floor = job.floors.get(q);
      const int64_t n_kept = lows(q, low);
      if (guess && guesses[static_cast<size_t>(q)] > -kInfinity) {
        const float guessed = guesses[static_cast<size_t>(q)];
        if (std::count_if(low.begin(), low.end(), [&](float score) { return score >= guessed; }) < search.k) {
          wrong[static_cast<size_t>(q)] = 1;
          continue;
        }
      }
      if (n_kept > search.k) floor = std::max(floor, job.floor_of(low.data(), n_kept, search.k));
      rows.clear();
      for (const auto& slot : found) {
        if (slot == nullptr) continue;
        const Kept& kept = slot->kept[static_cast<size_t>(q)];
        for (int64_t i = 0; i < kept.count; i++) {
          if (kept.high[i] >= floor) rows.push_back(kept.row[i]);
        }
      }
      best.write_of(which[static_cast<size_t>(q)], rows);
      rescored.fetch_add(static_cast<int64_t>(rows.size()), std::memory_order_relaxed);
    }
  });
  report.rescored += rescored.load();
  Left left;
  for (int64_t q = 0; q < n; q++) {
    if (wrong[static_cast<size_t>(q)]) left.guessed_wrong.push_back(which[static_cast<size_t>(q)]);
    if (job.given_up[static_cast<size_t>(q)].load()) left.too_many.push_back(which[static_cast<size_t>(q)]);
  }
  return left;
}

}  // namespace

std::vector<int64_t> scan_all(const Search& search, const Way& way, const Allowed& allowed,
                              const std::vector<int64_t>& which, double largest_norm, bool guess, Report& report) {
  const int64_t k = std::min(search.k, search.scan.n_rows);
  const int64_t capacity = (way.table.stored == Stored::int8 ? 2 * k : k) + std::max<int64_t>(k / 2, 156);
  const int64_t each = search.threads * kept_bytes(capacity);
  std::vector<int64_t> again, left, some;
  int64_t bytes = 0;
  for (size_t i = 0; i < which.size(); i++) {
    some.push_back(which[i]);
    bytes += each + DeniedRows::bytes_for(search, which[i]);
    const bool last = i + 1 == which.size();
    if (!last && bytes + each + DeniedRows::bytes_for(search, which[i + 1]) <= kBufferBytes) continue;
    const Left more = scan(search, way, allowed, some, capacity, largest_norm, guess, report);
    again.insert(again.end(), more.guessed_wrong.begin(), more.guessed_wrong.end());
    left.insert(left.end(), more.too_many.begin(), more.too_many.end());
    some.clear();
    bytes = 0;
  }
  if (!again.empty()) {
    report.guessed_wrong += static_cast<int64_t>(again.size());
    const std::vector<int64_t> more = scan_all(search, way, allowed, again, largest_norm, false, report);
    left.insert(left.end(), more.begin(), more.end());
  }
  return left;
}

}  // namespace topk
}  // namespace fastdiff
