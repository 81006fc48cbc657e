#include "score_topk_filters.h"

#include <algorithm>
#include <cstring>

#include "thread_pool.h"

namespace fastdiff {
namespace topk {
namespace {

// log2 of the places, at least twice the rows listed; 0 for none.
int bits_for(const Search& search, int64_t query) {
  if (search.exclude.offsets == nullptr) return 0;
  const int64_t n = search.exclude.offsets[query + 1] - search.exclude.offsets[query];
  if (n == 0) return 0;
  int bits = 3;
  while ((int64_t{1} << bits) < 2 * n) bits++;
  return bits;
}

// Words of 64 bits: of the marks, and of the places.
int64_t words_of_marks(int bits) { return bits == 0 ? 0 : int64_t{1} << (bits - 3); }
int64_t words_of(int bits) { return 5 * words_of_marks(bits); }

}  // namespace

DeniedRows::DeniedRows(const Search& search, const std::vector<int64_t>& which) {
  if (search.exclude.offsets == nullptr) return;
  int64_t total = 0;
  std::vector<int64_t> starts;
  for (const int64_t query : which) {
    denied_.emplace_back();
    denied_.back().bits = bits_for(search, query);
    starts.push_back(total);
    total += words_of(denied_.back().bits);
  }
  memory_ = Aligned<uint64_t>(total);
  const int64_t n = static_cast<int64_t>(which.size()), per_task = std::max<int64_t>(1, n / 64);
  parallel(total > 2048 ? search.threads : 1, (n + per_task - 1) / per_task, [&](int64_t task) {
    for (int64_t i = task * per_task; i < std::min(n, (task + 1) * per_task); i++) {
      Denied& denied = denied_[static_cast<size_t>(i)];
      if (denied.bits == 0) continue;
      denied.marks = memory_.get() + starts[static_cast<size_t>(i)];
      const int64_t n_marks = words_of_marks(denied.bits);
      std::fill(denied.marks, denied.marks + n_marks, 0);
      std::fill(denied.marks + n_marks, denied.marks + words_of(denied.bits), ~uint64_t{0});
      denied.places = reinterpret_cast<uint32_t*>(denied.marks + n_marks);
      const int64_t query = which[static_cast<size_t>(i)];
      for (int64_t j = search.exclude.offsets[query]; j < search.exclude.offsets[query + 1]; j++) {
        denied.add(static_cast<uint32_t>(search.exclude.values[j]));
      }
    }
  });
}

int64_t DeniedRows::bytes_for(const Search& search, int64_t query) { return 8 * words_of(bits_for(search, query)); }

Allowed::Allowed(const Search& search) {
  if (search.allowed == nullptr) {
    count = search.scan.n_rows;
    return;
  }
  const int64_t n = search.scan.n_rows, n_blocks = (n + 63) / 64;
  bits.resize(static_cast<size_t>(n_blocks));
  for (int64_t block = 0; block < n_blocks; block++) {
    const unsigned char* flag = reinterpret_cast<const unsigned char*>(search.allowed) + block * 64;
    const int64_t here = std::min<int64_t>(64, n - block * 64);
    uint64_t word = 0;
    int64_t i = 0;
    for (; i + 8 <= here; i += 8) {  // eight bytes of 0 or 1 to eight bits
      uint64_t eight;
      std::memcpy(&eight, flag + i, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
      word |= ((eight * 0x0102040810204080u) >> 56) << i;
#else
      for (int j = 0; j < 8; j++) word |= static_cast<uint64_t>(flag[i + j] != 0) << (i + j);
#endif
    }
    for (; i < here; i++) word |= static_cast<uint64_t>(flag[i] != 0) << i;
    bits[static_cast<size_t>(block)] = word;
    count += __builtin_popcountll(word);
  }
}

std::vector<int32_t> Allowed::rows() const {
  std::vector<int32_t> rows;
  rows.reserve(static_cast<size_t>(count));
  for (size_t block = 0; block < bits.size(); block++) {
    for (uint64_t word = bits[block]; word != 0; word &= word - 1) {
      rows.push_back(static_cast<int32_t>(block * 64 + static_cast<size_t>(__builtin_ctzll(word))));
    }
  }
  return rows;
}

}  // namespace topk
}  // namespace fastdiff
