#include "team.h"

#include <sched.h>

#include <algorithm>

namespace fastdiff {

int Team::members() const { return std::min(come_.load(std::memory_order_acquire), most_); }

int Team::open() {
  const bool broken = broken_.load(std::memory_order_acquire);
  const int count = broken ? 1 : members();
  places_[0].meeting_here = round_ * meetings_;
  round_++;
  if (count > 1) opened_.store(round_ * (kMost + 1) + count, std::memory_order_release);
  return count;
}

bool Team::end() {
  opened_.store(kOver, std::memory_order_release);
  return !broken_.load(std::memory_order_acquire);
}

int Team::join() {
  const int place = come_.fetch_add(1, std::memory_order_acq_rel);
  return place < most_ ? place : 0;
}

int Team::follow(int member, int64_t& round) {
  for (int64_t opened = places_[member].opened;;) {
    if (!wait(opened_, opened + 1)) return 0;
    opened = opened_.load(std::memory_order_acquire);
    if (opened == kOver) return 0;
    const int count = static_cast<int>(opened % (kMost + 1));
    if (member >= count) continue;
    places_[member].opened = opened;
    round = opened / (kMost + 1) - 1;
    places_[member].meeting_here = round * meetings_;
    return count;
  }
}

bool Team::wait_longer(const std::atomic<int64_t>& value, int64_t least) {
  const auto until = std::chrono::steady_clock::now() + patience_;
  do {
    for (int look = 0; look < 32; look++) {
      if (value.load(std::memory_order_acquire) >= least) return true;
      pause();
    }
    if (broken_.load(std::memory_order_acquire)) return false;
    sched_yield();
  } while (std::chrono::steady_clock::now() < until);
  broken_.store(true, std::memory_order_release);
  return false;
}

}  // namespace fastdiff
