// What the threads of one scan keep for its queries, and the floors that say what is worth keeping.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "aligned.h"
#include "score_topk_exact.h"
#include "score_topk_filters.h"
#include "score_topk_order.h"
#include "score_topk_search.h"

namespace fastdiff {
namespace topk {

// The floors that all threads share: what one has found serves the others.
class Floors {
 public:
  explicit Floors(int64_t n) : floors_(new std::atomic<float>[static_cast<size_t>(n)]), n_(n) {
    for (int64_t i = 0; i < n; i++) floors_[static_cast<size_t>(i)].store(-kInfinity, std::memory_order_relaxed);
  }
  float raise(int64_t i, float floor) {
    std::atomic<float>& shared = floors_[static_cast<size_t>(i)];
    float now = shared.load(std::memory_order_relaxed);
    while (now < floor && !shared.compare_exchange_weak(now, floor, std::memory_order_relaxed)) {
    }
    return std::max(now, floor);
  }
  float get(int64_t i) const { return floors_[static_cast<size_t>(i)].load(std::memory_order_relaxed); }
  int64_t size() const { return n_; }

 private:
  std::unique_ptr<std::atomic<float>[]> floors_;
  int64_t n_;
};

struct Job;

// Of one thread. A scan keeps denied rows like others: they are few, and whether a row is one of them is asked for many
// at a time, before what is kept says anything about the floor.
struct Found {
  Job& job;
  Aligned<float> floor;
  std::vector<Kept> kept;
  std::vector<int64_t> checked;  // how many of the first kept are surely not denied
  Aligned<char> buffers, scratch;
  std::vector<Aligned<char>> grown;
  Slot slot;

  explicit Found(Job& job);
  void drop_denied(int64_t q);
};

struct Job {
  const Search& search;
  int64_t k;  // the place whose score is the floor: in a sample, a higher one
  const Queries queries;
  const Denied* denied;  // [queries.n]; null: nothing
  int64_t capacity;
  Floors floors;
  float (*const floor_of)(const float*, int64_t, int64_t) = FASTDIFF_PICK(topk_floor);
  int64_t (*const prune)(Kept&, float) = FASTDIFF_PICK(topk_prune);
  std::atomic<int64_t> may_grow{search.spare_bytes};
  std::unique_ptr<std::atomic<bool>[]> given_up;

  Job(const Search& search, int64_t k, const Queries& queries, const Denied* denied, int64_t capacity)
      : search(search),
        k(k),
        queries(queries),
        denied(denied),
        capacity(capacity),
        floors(queries.n),
        given_up(new std::atomic<bool>[static_cast<size_t>(queries.n)]) {
    for (int64_t q = 0; q < queries.n; q++) given_up[static_cast<size_t>(q)].store(false, std::memory_order_relaxed);
  }
};

// What one thread needs for one query.
inline int64_t kept_bytes(int64_t capacity) { return 12 * capacity; }

}  // namespace topk
}  // namespace fastdiff
