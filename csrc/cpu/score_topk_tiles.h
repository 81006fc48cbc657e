// The scan with AMX's tiles.
#pragma once

#include <cstring>

#include "dot_tiles.h"
#include "score_topk_blocks.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

#if defined(__AMX_TILE__)
class TileScan : Blocks {
 public:
  explicit TileScan(const ScanArgs& args) : Blocks(args) {}

  void run() {
    const int64_t element = args_.product == Product::int8_tiles ? 1 : 2;
    in_tiles_ = table_.stored != Stored::float32 && dim_ * element == 4 * queries_.steps;
    const int most = queries_.n > kTile ? 1 : kTogether;
    int n = 0;
    for (int64_t block = args_.first_block; block < args_.last_block; block++) {
      block_ = blocks_ + n;
      if (open(block)) {
        set_thresholds();
        n++;
      }
      if (n == most || (n > 0 && block + 1 == args_.last_block)) {
        if (element == 1) {
          tiles<true>(n);
        } else {
          tiles<false>(n);
        }
        n = 0;
      }
    }
  }

 private:
  float score_of(int64_t q, int32_t sum) const {
    return static_cast<float>(sum - queries_.zero[q]) * (queries_.scale[q] * block_->bound.scale);
  }

  // Blocks 0 .. n - 1; with more than one there is one tile of queries.
  template <bool int8>
  void tiles(int n) {
    const int64_t steps = queries_.steps / 16, width = 64 * steps;
    const char* rows[kTogether];
    int64_t apart[kTogether];
    const char *next = nullptr, *next_end = nullptr;  // what is still to be fetched of the rows ahead
    for (int i = 0; i < n; i++) {
      block_ = blocks_ + i;
      if (in_tiles_ && block_->in_place) {
        rows[i] = block_->rows[0];
        apart[i] = table_.row_bytes;
        continue;
      }
      char* packed = packed_ + i * kBlock * width;
      for (int64_t row = 0; row < kBlock; row++) {
        prefetch(row);
        narrow_row(block_->rows[row], packed + row * width, width);
      }
      rows[i] = packed;
      apart[i] = width;
    }
    const int64_t ahead = block_->first + (n == 1 ? kAhead : 2 * kTogether - n + 1) * kBlock;
    if (in_tiles_ && block_->in_place && ahead + n * kBlock <= table_.n_rows) {
      next = table_.row(ahead);
      next_end = next + n * kBlock * table_.row_bytes;
    }
    // each result is looked at while the next is being computed
    constexpr int64_t kSums = kBlock * kTile * 4;
    const int64_t n_tiles = n > 1 ? n : (queries_.n + kTile - 1) / kTile, words = queries_.steps * kTile;
    const int64_t share = round_up((next_end - next + n_tiles - 1) / n_tiles, 64);
    const auto fetch = [&] {  // a share at a time: more requests at once would wait for one another
      for (const char* end = next_end - next < share ? next_end : next + share; next < end; next += 64) {
        _mm_prefetch(next, _MM_HINT_T1);
      }
    };
    const auto block_of = [&](int64_t tile) { return n > 1 ? tile : 0; };
    const auto query_of = [&](int64_t tile) { return n > 1 ? 0 : tile; };
    Highest<int8> highest;
    fetch();
    dot_with_tiles<int8>(rows[0], apart[0], queries_.words, steps, sums_, nullptr, highest.group);
    for (int64_t tile = 1; tile < n_tiles; tile++) {
      char* before = sums_ + (tile - 1) % 2 * kSums;
      fetch();
      dot_with_tiles<int8>(rows[block_of(tile)], apart[block_of(tile)], queries_.words + query_of(tile) * words, steps,
                           sums_ + tile % 2 * kSums, before, highest.group);
      block_ = blocks_ + block_of(tile - 1);
      compare_tile<int8>(query_of(tile - 1) * kTile, before, highest);
    }
    char* last = sums_ + (n_tiles - 1) % 2 * kSums;
    for (int group = 0; group < 4; group++) highest.group[group] = highest_of_rows<int8>(last + group * 1024, 0, 16);
    block_ = blocks_ + block_of(n_tiles - 1);
    compare_tile<int8>(query_of(n_tiles - 1) * kTile, last, highest);
  }

  // Of each 16 rows the highest sum of each of 16 queries.
  template <bool int8>
  struct Highest {
    __m512i group[4];
  };

  template <bool int8>
  static FASTDIFF_INLINE uint32_t reach(__m512i sums, __m512i threshold) {
    return bits(Mask{int8 ? _mm512_cmpge_epi32_mask(sums, threshold)
                          : _mm512_cmp_ps_mask(_mm512_castsi512_ps(sums), _mm512_castsi512_ps(threshold), _CMP_GE_OQ)});
  }

  template <bool int8>
  FASTDIFF_INLINE void compare_tile(int64_t q, const char* sums, const Highest<int8>& highest) {
    const __m512i threshold = _mm512_loadu_si512(threshold_space() + 4 * q);
    const __m512i all = higher<int8>(higher<int8>(highest.group[0], highest.group[1]),
                                     higher<int8>(highest.group[2], highest.group[3]));
    if (__builtin_expect(reach<int8>(all, threshold) == 0, 1)) return;
    look_closer<int8>(q, sums, highest);
  }

  template <bool int8>
  __attribute__((noinline)) void look_closer(int64_t q, const char* sums, const Highest<int8>& highest) {
    const __m512i threshold = _mm512_loadu_si512(threshold_space() + 4 * q);
    for (int group = 0; group < 4; group++) {
      if (reach<int8>(highest.group[group], threshold) == 0) continue;
      for (int row = group * 16; row < group * 16 + 16; row++) {
        uint32_t hits = reach<int8>(_mm512_load_si512(sums + 64 * row), threshold);
        for (; hits != 0; hits &= hits - 1) {
          const int lane = __builtin_ctz(hits);
          uint32_t word;
          std::memcpy(&word, sums + 64 * row + 4 * lane, 4);
          float score;
          std::memcpy(&score, &word, 4);
          keep(q + lane, row, int8 ? score_of(q + lane, static_cast<int32_t>(word)) : score);
        }
      }
    }
  }
};
#endif

}  // namespace
}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
