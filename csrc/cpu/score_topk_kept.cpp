#include "score_topk_kept.h"

namespace fastdiff {
namespace topk {
namespace {

Kept lay_out(char* memory, int64_t capacity) {
  Kept kept;
  kept.low = reinterpret_cast<float*>(memory);
  kept.high = kept.low + capacity;
  kept.row = reinterpret_cast<int32_t*>(kept.high + capacity);
  kept.count = 0;
  kept.capacity = capacity;
  return kept;
}

void make_room(Slot& slot, int64_t q) {
  Found& found = *static_cast<Found*>(slot.owner);
  Job& job = found.job;
  Kept& kept = found.kept[static_cast<size_t>(q)];
  std::atomic<bool>& given_up = job.given_up[static_cast<size_t>(q)];
  int64_t& checked = found.checked[static_cast<size_t>(q)];
  if (!given_up.load(std::memory_order_relaxed)) {
    const int64_t enough = kept.capacity - kept.capacity / 4;
    found.drop_denied(q);
    if (kept.count < job.k) return;
    slot.floor[q] = job.floors.raise(q, std::max(slot.floor[q], job.floor_of(kept.low, kept.count, job.k)));
    checked = job.prune(kept, slot.floor[q]);
    if (checked <= enough) return;
    const int64_t capacity = 2 * kept.capacity, bytes = kept_bytes(capacity);
    if (job.may_grow.fetch_sub(bytes, std::memory_order_relaxed) >= bytes) {
      found.grown.emplace_back(bytes);
      Kept larger = lay_out(found.grown.back().get(), capacity);
      larger.count = kept.count;
      std::copy(kept.low, kept.low + kept.count, larger.low);
      std::copy(kept.high, kept.high + kept.count, larger.high);
      std::copy(kept.row, kept.row + kept.count, larger.row);
      kept = larger;
      return;
    }
    job.may_grow.fetch_add(bytes, std::memory_order_relaxed);
    given_up.store(true, std::memory_order_relaxed);
  }
  kept.count = checked = 0;
  slot.floor[q] = kInfinity;
}

}  // namespace

Found::Found(Job& job)
    : job(job),
      floor(job.queries.n_padded),
      checked(static_cast<size_t>(job.queries.n), 0),
      buffers(kept_bytes(job.capacity) * job.queries.n),
      scratch(scratch_bytes(job.search.scan.dim, job.queries.n_padded)) {
  floor.fill(kInfinity);
  for (int64_t q = 0; q < job.queries.n; q++) {
    floor[q] = job.floors.get(q);
    kept.push_back(lay_out(buffers.get() + q * kept_bytes(job.capacity), job.capacity));
  }
  slot.floor = floor.get();
  slot.kept = kept.data();
  slot.scratch = scratch.get();
  slot.owner = this;
  slot.full = &make_room;
}

void Found::drop_denied(int64_t q) {
  if (job.denied == nullptr || job.denied[q].bits == 0) return;
  const Denied denied = job.denied[q];
  Kept& all = kept[static_cast<size_t>(q)];
  int64_t left = checked[static_cast<size_t>(q)];
  for (int64_t i = left; i < all.count; i++) {
    const float low = all.low[i], high = all.high[i];
    const int32_t row = all.row[i];
    all.low[left] = low;
    all.high[left] = high;
    all.row[left] = row;
    left += !denied.has(static_cast<uint32_t>(row));
  }
  all.count = checked[static_cast<size_t>(q)] = left;
}

}  // namespace topk
}  // namespace fastdiff
