// Team: its members meet, may come late, and are not waited for when they stay away.
#include <thread>

#include "../cpu/team.h"
#include "check.h"

namespace fastdiff {
namespace tests {
namespace {

constexpr std::chrono::minutes kLong{1};

// Each member fills its place in every meeting; plain ints, so that the sanitizer sees one that is read too early.
void members_see_what_others_wrote(int members, int rounds, int meetings) {
  Team team(meetings, members, kLong);
  std::vector<std::vector<int>> written(meetings, std::vector<int>(Team::kMost, -1));
  const auto round_of = [&](int member, int count, int round) {
    for (int meeting = 0; meeting < meetings; meeting++) {
      written[meeting][member] = round;
      const bool met = team.meet(member, count);
      if (member > 0 && meeting + 1 == meetings) return !met;  // the leader alone goes on
      if (!met) return false;
      for (int other = 0; other < count; other++) {
        EXPECT(written[meeting][other] == round, "member ", member, " met ", other, " too early");
      }
    }
    return true;
  };
  std::vector<std::thread> helpers;
  std::vector<int> seen(Team::kMost + 8, 0);
  for (int helper = 1; helper < members + 2; helper++) {
    helpers.emplace_back([&, helper] {
      if (helper % 3 == 2) std::this_thread::sleep_for(std::chrono::microseconds(300));  // comes to a later round
      const int member = team.join();
      if (member == 0) return;
      int64_t round = -1, last = -1;
      while (const int count = team.follow(member, round)) {
        EXPECT(round > last && member < count, "a round twice, or without this member");
        last = round;
        EXPECT(round_of(member, count, static_cast<int>(round)), "the team broke up");
        seen[member]++;
      }
    });
  }
  while (team.members() < 2) std::this_thread::yield();
  int joint = 0;
  for (int round = 0; round < rounds; round++) {
    const int count = team.open();
    EXPECT(count >= 2 && count <= members, "a round of ", count);
    EXPECT(round_of(0, count, round), "the team broke up");
    joint += count - 1;
  }
  EXPECT(team.end(), "the team broke up");
  for (std::thread& helper : helpers) helper.join();
  for (const int rounds_of_member : seen) joint -= rounds_of_member;
  EXPECT(joint == 0, "a member missed a round");
}

void who_stays_away_is_not_waited_for() {
  Team team(3, 2);
  EXPECT(team.open() == 1, "nobody has come");
  EXPECT(team.join() == 1, "the first place");
  EXPECT(team.join() == 0, "a place in a full team");
  EXPECT(team.open() == 2, "one has come");
  EXPECT(!team.meet(0, 2), "met one that was not there");
  EXPECT(team.open() == 1, "a team that broke up");
  int64_t round = 0;
  EXPECT(team.follow(1, round) == 2 && round == 1, "the round that it was missed in");
  EXPECT(team.meet(1, 2) && !team.meet(1, 2), "the leader brought one meeting and no more");
  EXPECT(!team.end(), "a team that broke up");
  EXPECT(team.follow(1, round) == 0, "a round after the end");
}

void a_leader_that_stays_away_is_not_waited_for() {
  Team team(2, 2);
  const int member = team.join();
  int64_t round = 0;
  EXPECT(team.follow(member, round) == 0, "a round that nobody opened");
  EXPECT(team.open() == 1, "a team that broke up");
  EXPECT(!team.end(), "a team that broke up");
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff::tests;
  for (const int members : {2, 3, 5}) {
    for (int call = 0; call < 20; call++) members_see_what_others_wrote(members, 50, 4);
  }
  who_stays_away_is_not_waited_for();
  a_leader_that_stays_away_is_not_waited_for();
  return 0;
}
