// Histories as lists of rows: padding off, cut to the window, hashed. Plain C++: no Python, no torch.
//
// `fastdiff/histories.py` defines what is done here; what it would refuse is left to it (`add` and `close` say so).

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastdiff {

// What the model says about its histories.
struct Format {
  bool padding;         // whether there may be any; the next two count only then
  int64_t pad_id;       // the row that stands for no item, and the id that marks padding beside -1
  bool pad_inside;      // whether that id may stand between items, as a masked slot
  int64_t max_seq_len;  // the window
};

// Takes the ids of one history after the other; holds the rows of all, end to end.
class Packing {
 public:
  explicit Packing(const Format& format) : format_(format), offsets_(1, 0) {}

  // The histories come as one padded array.
  void expect_padded(size_t n_users, size_t n_ids) {
    padded_ = true;
    offsets_.reserve(n_users + 1);
    rows_.reserve(n_ids);
  }

  // The next id of the open history. False where it is neither known nor padding.
  template <class Index>
  bool add(int64_t id, const Index& index) {
    const int64_t row = index.find(id);
    if (row >= 0) {
      rows_.push_back(row);
      return true;
    }
    if (!format_.padding || (id != -1 && id != format_.pad_id)) return false;
    rows_.push_back(id == -1 ? kMarked : kPadId);
    any_pad_ = true;
    return true;
  }

  // The same with its row.
  void add_row(int64_t row) { rows_.push_back(row); }

  // Ends the open history. False where padding stands between its items.
  bool close() {
    if (any_pad_ && !strip()) return false;
    any_pad_ = false;
    offsets_.push_back(static_cast<int64_t>(rows_.size()));
    return true;
  }

  int64_t n_users() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  const std::vector<int64_t>& rows() const { return rows_; }
  const std::vector<int64_t>& offsets() const { return offsets_; }

  // The longest history as the model sees it.
  int64_t width() const {
    int64_t longest = 0;
    for (size_t user = 0; user + 1 < offsets_.size(); ++user) longest = std::max(longest, window_length(user));
    return longest;
  }

  // window [B, width], left-aligned, the pad id beyond each length; lengths [B]; row_key [B], `noise.history_row_key`.
  void write(int64_t* window, int64_t width, int64_t* lengths, int64_t* row_key) const {
    for (size_t user = 0; user + 1 < offsets_.size(); ++user) {
      const int64_t length = window_length(user);
      const int64_t* source = rows_.data() + offsets_[user + 1] - length;
      int64_t* target = window + static_cast<int64_t>(user) * width;
      uint64_t sum = 0;
      for (int64_t j = 0; j < length; ++j) {
        target[j] = source[j];
        sum += mix(static_cast<uint64_t>(source[j]) + static_cast<uint64_t>(j + 1) * kGolden);
      }
      std::fill(target + length, target + width, format_.pad_id);
      lengths[user] = length;
      const uint64_t key = mix(sum + static_cast<uint64_t>(length) + kGolden);
      std::memcpy(row_key + user, &key, sizeof key);
    }
  }

 private:
  // What stands in `rows_` for a pad while its history is open.
  static constexpr int64_t kMarked = -1;  // the id -1
  static constexpr int64_t kPadId = -2;   // the model's pad id

  // the constants of splitmix64 (Steele et al. 2014)
  static constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  static uint64_t mix(uint64_t h) {
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    return h ^ (h >> 31);
  }

  int64_t window_length(size_t user) const {
    return std::min(offsets_[user + 1] - offsets_[user], format_.max_seq_len);
  }

  bool strip() {
    const auto begin = rows_.begin() + offsets_.back();
    const auto is_item = [](int64_t row) { return row >= 0; };
    const auto first = std::find_if(begin, rows_.end(), is_item);
    const auto after = std::find_if(rows_.rbegin(), std::make_reverse_iterator(first), is_item).base();
    const bool marks = std::find(begin, rows_.end(), kMarked) != rows_.end();
    for (auto place = first; place < after; ++place) {
      if (*place == kMarked || (*place == kPadId && !format_.pad_inside)) return false;
    }
    if (!format_.pad_inside) {
      rows_.erase(after, rows_.end());
      rows_.erase(begin, first);
      return true;
    }
    if (padded_ && !marks) {  // a pad id at an edge is padding, but an item behind a left-padded history
      if (first == begin) rows_.erase(after, rows_.end());
      rows_.erase(begin, first);
    } else {  // -1 marks the padding, so a pad id is an item
      rows_.erase(std::remove(begin, rows_.end(), kMarked), rows_.end());
    }
    std::replace(rows_.begin() + offsets_.back(), rows_.end(), kPadId, format_.pad_id);
    return true;
  }

  Format format_;
  bool padded_ = false;
  bool any_pad_ = false;
  std::vector<int64_t> rows_;
  std::vector<int64_t> offsets_;
};

}  // namespace fastdiff
