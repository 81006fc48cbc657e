// From external item ids to rows of the item table. Plain C++: no Python, no torch.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fastdiff {

// Ids that are the row numbers; special rows (pad, mask) name no item.
class RowIndex {
 public:
  RowIndex(int64_t n_rows, std::vector<int64_t> special) : n_rows_(n_rows), special_(std::move(special)) {}

  // The row, or -1.
  int64_t find(int64_t id) const {
    if (id < 0 || id >= n_rows_) return -1;
    for (const int64_t row : special_) {
      if (id == row) return -1;
    }
    return id;
  }

 private:
  int64_t n_rows_;
  std::vector<int64_t> special_;
};

// Ids that are any integers: a sorted copy, cut into at most 2n equal stretches of numbers. A look-up goes to the start
// of its stretch and bisects inside: ids that are dense or evenly spread are found at once, and however they lie it
// takes no more than log2(n) steps.
class IntegerIndex {
 public:
  // ids [n] ascending, each once; rows [n]. Both are kept, not copied.
  IntegerIndex(const int64_t* ids, const int64_t* rows, int64_t n) : ids_(ids), rows_(rows), n_(n) {
    if (n >= (int64_t{1} << 32)) throw std::invalid_argument("IntegerIndex: must hold fewer than 2^32 ids");
    for (int64_t i = 0; i < n; ++i) {
      if (rows[i] < 0) throw std::invalid_argument("IntegerIndex: rows must not be negative");
      if (i > 0 && ids[i - 1] >= ids[i]) throw std::invalid_argument("IntegerIndex: ids must ascend, each once");
    }
    if (n == 0) return;
    const uint64_t range = distance(ids[n - 1]);
    while ((range >> shift_) >= 2 * static_cast<uint64_t>(n)) ++shift_;
    const uint64_t n_stretches = (range >> shift_) + 1;
    starts_.resize(n_stretches + 1);
    uint64_t next = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t own = distance(ids[i]) >> shift_;
      for (; next <= own; ++next) starts_[next] = static_cast<uint32_t>(i);
    }
    for (; next <= n_stretches; ++next) starts_[next] = static_cast<uint32_t>(n);
  }

  // The row, or -1.
  int64_t find(int64_t id) const {
    if (n_ == 0 || id < ids_[0] || id > ids_[n_ - 1]) return -1;
    const uint64_t stretch = distance(id) >> shift_;
    uint64_t low = starts_[stretch], high = starts_[stretch + 1];
    while (low < high) {
      const uint64_t middle = low + (high - low) / 2;
      if (ids_[middle] < id) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    // an empty stretch ends where the next one starts, or behind the last id; `id` is at most the last one
    return low < static_cast<uint64_t>(n_) && ids_[low] == id ? rows_[low] : -1;
  }

 private:
  // From the smallest id: differences of int64 fit in uint64, whose arithmetic wraps.
  uint64_t distance(int64_t id) const { return static_cast<uint64_t>(id) - static_cast<uint64_t>(ids_[0]); }

  const int64_t* ids_;
  const int64_t* rows_;
  int64_t n_;
  unsigned shift_ = 0;
  std::vector<uint32_t> starts_;
};

}  // namespace fastdiff
