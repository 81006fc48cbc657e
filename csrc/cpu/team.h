// A team: a few threads that take the same steps together, each a part of every piece of work, and meet after each.
//
// For work too small to be cut into independent tasks, whose pieces last microseconds: to hand each one to the pool would
// cost more than it saves. One thread leads, and the result never waits for another: the leader opens a round to those
// that have come by then, alone if nobody has; whoever is missed at a meeting for longer than a moment ends the team, and
// the leader does that round again, and all that follow, alone. What a round begins from must stand until it is over, and
// what the leader computes alone must lie elsewhere than what the team computes, as a member that slept still writes it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "spin.h"

// Kernels use it: see levels.h for why they inline it.
#define FASTDIFF_TEAM_INLINE inline __attribute__((always_inline))

namespace fastdiff {

class Team {
 public:
  static constexpr int kMost = 8;

  // meetings of a round, how many members there may be, the leader among them, and how long one is waited for: many times
  // what a round takes
  Team(int meetings, int most, std::chrono::microseconds patience = std::chrono::microseconds(100))
      : meetings_(meetings), most_(most < kMost ? most : kMost), patience_(patience) {}

  // How many have come, the leader among them.
  int members() const;

  // For the leader, member 0. Opens the next round and says how many take part, those with the numbers below; 1 is the
  // leader alone. They all see what it wrote before.
  int open();
  // There are no more rounds. False if the team broke up before.
  bool end();

  // For the others. A place in the team: 1, 2, .., or 0 if all are taken.
  int join();
  // Waits for the next round in which `member` takes part, sets `round`, from 0 up, and says how many do; 0 when there is
  // none.
  int follow(int member, int64_t& round);

  // The next meeting of this round, for `member` of `count`: what they all wrote before, this one sees after. False when
  // the team broke up, and for all but the leader at the last meeting of a round: they have brought what they had to.
  FASTDIFF_TEAM_INLINE bool meet(int member, int count) {
    const int64_t now = ++places_[member].meeting_here;
    places_[member].meeting.store(now, std::memory_order_release);
    if (member > 0 && now % meetings_ == 0) return false;
    for (int other = 0; other < count; other++) {
      if (other != member && !wait(places_[other].meeting, now)) return false;
    }
    return true;
  }

 private:
  FASTDIFF_TEAM_INLINE bool wait(const std::atomic<int64_t>& value, int64_t least) {
    for (int look = 0; look < kLooks; look++) {
      if (value.load(std::memory_order_acquire) >= least) return true;
      pause();
    }
    return wait_longer(value, least);
  }
  // Until value >= least; false when the team broke up, as it does when this takes too long.
  bool wait_longer(const std::atomic<int64_t>& value, int64_t least);

  static constexpr int kLooks = 200;
  static constexpr int64_t kOver = INT64_MAX;

  struct alignas(64) Place {
    std::atomic<int64_t> meeting{0};
    int64_t meeting_here = 0, opened = 0;  // the member's own: its last meeting and its last round's opened_
  };
  const int meetings_, most_;
  const std::chrono::microseconds patience_;
  int64_t round_ = 0;
  alignas(64) std::atomic<int64_t> opened_{0};  // round_ (kMost + 1) + count, or kOver
  alignas(64) std::atomic<int> come_{1};
  std::atomic<bool> broken_{false};
  Place places_[kMost];
};

}  // namespace fastdiff
