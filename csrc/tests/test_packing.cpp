// Item ids found wherever they lie, and histories packed: against loops that look at one thing at a time.
#include <algorithm>
#include <map>

#include "../python/item_index.h"
#include "../python/packing.h"
#include "check.h"

namespace fastdiff {
namespace tests {
namespace {

constexpr int64_t kLow = std::numeric_limits<int64_t>::min(), kHigh = std::numeric_limits<int64_t>::max();

void find_all(std::vector<int64_t> ids, Draws& draws) {
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  std::vector<int64_t> rows(ids.size());
  for (int64_t& row : rows) row = draws.below(1000000);
  std::map<int64_t, int64_t> known;
  for (size_t i = 0; i < ids.size(); i++) known[ids[i]] = rows[i];
  const IntegerIndex index(ids.data(), rows.data(), static_cast<int64_t>(ids.size()));
  std::vector<int64_t> asked = {kLow, kLow + 1, -1, 0, 1, kHigh - 1, kHigh};
  for (const int64_t id : ids) {
    asked.push_back(id);
    if (id != kLow) asked.push_back(id - 1);
    if (id != kHigh) asked.push_back(id + 1);
  }
  for (const int64_t id : asked) {
    const auto at = known.find(id);
    const int64_t want = at == known.end() ? -1 : at->second, got = index.find(id);
    EXPECT(got == want, "id ", id, " of ", ids.size(), " is in row ", got, ", not ", want);
  }
}

void test_ids() {
  Draws draws(1);
  for (const std::vector<int64_t>& ids : std::vector<std::vector<int64_t>>{
           {}, {0}, {-1}, {kLow}, {kHigh}, {kLow, kHigh}, {kLow, kLow + 1, 0, kHigh - 1, kHigh}, {5, 6, 7, 8, 9}}) {
    find_all(ids, draws);
  }
  for (int64_t n = 1; n < 3000; n = 2 * n + 1) {
    std::vector<int64_t> anywhere, dense, clustered;
    for (int64_t i = 0; i < n; i++) {
      anywhere.push_back(static_cast<int64_t>(draws.word()));
      dense.push_back(draws.below(2 * n) - n);
      clustered.push_back((i % 3 ? 0 : kHigh / 2) + draws.below(4 * n));
    }
    clustered.push_back(kLow);
    find_all(anywhere, draws);
    find_all(dense, draws);
    find_all(clustered, draws);
  }
  const RowIndex rows(10, {0, 4});
  for (const int64_t id : std::vector<int64_t>{kLow, -1, 0, 4, 10, kHigh}) EXPECT(rows.find(id) == -1, id);
  for (const int64_t id : {1, 3, 5, 9}) EXPECT(rows.find(id) == id, id);
}

// The rows that are left of one history; false where it is refused.
bool strip(std::vector<int64_t> ids, const Format& format, bool padded, std::vector<int64_t>& rows) {
  const auto is_pad = [&](int64_t id) { return id == -1 || id == format.pad_id; };
  const bool marks = std::count(ids.begin(), ids.end(), -1) > 0;
  bool left_padded = false;
  if (!format.pad_inside) {
    while (!ids.empty() && is_pad(ids.back())) ids.pop_back();
    while (!ids.empty() && is_pad(ids.front())) ids.erase(ids.begin());
    for (const int64_t id : ids) {
      if (is_pad(id)) return false;
    }
  } else if (padded && !marks) {
    while (!ids.empty() && is_pad(ids.front())) {
      ids.erase(ids.begin());
      left_padded = true;
    }
    while (!left_padded && !ids.empty() && is_pad(ids.back())) ids.pop_back();
  } else {
    const auto item = [&](int64_t id) { return !is_pad(id); };
    const auto first = std::find_if(ids.begin(), ids.end(), item);
    const auto last = std::find_if(ids.rbegin(), ids.rend(), item).base();
    for (auto at = first; at < last; ++at) {
      if (*at == -1) return false;
    }
    ids.erase(std::remove(ids.begin(), ids.end(), -1), ids.end());
  }
  rows = ids;
  return true;
}

// All batches of two rows of up to four of: -1, the pad id, two items.
void test_packing(const Format& format, bool padded) {
  const RowIndex index(50, {format.pad_id});
  const std::vector<int64_t> alphabet = {-1, format.pad_id, 7, 20};
  std::vector<std::vector<int64_t>> histories = {{}};
  for (size_t first = 0; histories.size() < 1 + 4 + 16 + 64 + 256; first++) {
    for (const int64_t id : alphabet) {
      histories.push_back(histories[first]);
      histories.back().push_back(id);
    }
  }
  for (size_t i = 0; i < histories.size(); i++) {
    const std::vector<int64_t> batch[] = {histories[i], histories[(i * 37) % histories.size()]};
    Packing packing(format);
    if (padded) packing.expect_padded(2, batch[0].size() + batch[1].size());
    std::vector<std::vector<int64_t>> want;
    bool taken = true, wanted = true;
    for (const std::vector<int64_t>& ids : batch) {
      for (const int64_t id : ids) EXPECT(!taken || packing.add(id, index), "id ", id);
      taken = taken && packing.close();
      want.emplace_back();
      wanted = wanted && strip(ids, format, padded, want.back());
    }
    EXPECT(taken == wanted, "history ", i);
    if (!taken) continue;
    const size_t width = static_cast<size_t>(packing.width());
    std::vector<int64_t> window(2 * width, -7), lengths(2, -7), keys(2, 0);
    packing.write(window.data(), packing.width(), lengths.data(), keys.data());
    for (size_t user = 0; user < 2; user++) {
      const std::vector<int64_t> rows(packing.rows().begin() + packing.offsets()[user],
                                      packing.rows().begin() + packing.offsets()[user + 1]);
      EXPECT(rows == want[user], "history ", i);
      const size_t seen = std::min(rows.size(), static_cast<size_t>(format.max_seq_len));
      EXPECT(lengths[user] == static_cast<int64_t>(seen), "length ", lengths[user]);
      for (size_t j = 0; j < width; j++) {
        const int64_t row = j < seen ? rows[rows.size() - seen + j] : format.pad_id;
        EXPECT(window[user * width + j] == row, "window ", window[user * width + j], ", not ", row);
      }
    }
    const auto second = window.begin() + static_cast<std::ptrdiff_t>(width);
    const bool equal = lengths[0] == lengths[1] && std::equal(window.begin(), second, second);
    EXPECT((keys[0] == keys[1]) == equal, "row keys of history ", i);
  }
  Packing packing(format);
  EXPECT(!packing.add(50, index));
  EXPECT(!packing.add(-2, index));
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff::tests;
  test_ids();
  for (const bool pad_inside : {false, true}) {
    for (const bool padded : {false, true}) {
      for (const int64_t max_seq_len : {1, 2, 3, 8}) {
        for (const int64_t pad_id : {0, 49}) test_packing({true, pad_id, pad_inside, max_seq_len}, padded);
      }
    }
  }
  const fastdiff::RowIndex index(50, {0});
  fastdiff::Packing strict({false, 0, false, 0});
  EXPECT(strict.add(3, index) && !strict.add(-1, index));
  EXPECT(!fastdiff::Packing({false, 0, false, 0}).add(0, index));
  return 0;
}
