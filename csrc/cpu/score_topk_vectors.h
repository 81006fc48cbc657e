// The scan with products of vectors.
#pragma once

#include "dot_rows.h"
#include "dot_tiles.h"
#include "score_topk_blocks.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

constexpr int64_t kFew = 3;  // up to so many queries take rows one by one where they lie

class VectorScan : Blocks {
 public:
  explicit VectorScan(const ScanArgs& args) : Blocks(args) {}

  void run() {
    for (int64_t block = args_.first_block; block < args_.last_block; block++) {
      if (!open(block)) continue;
      set_thresholds();
      switch (args_.product) {
        case Product::float32:
          float32();
          break;
        case Product::bfloat16:
          bfloat16();
          break;
        case Product::int8:
          int8();
          break;
        default:
          break;
      }
    }
  }

 private:
  int32_t* whole_thresholds() { return reinterpret_cast<int32_t*>(threshold_space()); }

  // Row i of the block in float32, in place or in `space`.
  const float* wide_row(int64_t i, float* space) const {
    prefetch(i);
    switch (table_.stored) {
      case Stored::float32:
        return reinterpret_cast<const float*>(block_->rows[i]);
      case Stored::bfloat16:
        widen_bfloat16(block_->rows[i], dim_, space);
        return space;
      case Stored::float16:
        widen_float16(block_->rows[i], block_->bound.scale, dim_, space);
        return space;
      default:
        widen_int8(block_->rows[i], block_->bound.scale, dim_, space);
        return space;
    }
  }

  // All rows as panels [4][dim, 16] of float32.
  const float* wide_panels() {
    float* panels = reinterpret_cast<float*>(packed_);
    for (int group = 0; group < 4; group++) {
      const float* rows[16];
      for (int i = 0; i < 16; i++) rows[i] = wide_row(group * 16 + i, wide_ + i * (row_ / 4));
      to_panel(rows, dim_, panels + group * 16 * dim_);
    }
    return panels;
  }

  // All rows as panels [4][steps, 16] of words; the stored rows are as wide as that, or padded with zeros here.
  const float* word_panels() {
    const int64_t bytes = dim_ * (table_.stored == Stored::int8 ? 1 : 2), steps = queries_.steps;
    float* panels = reinterpret_cast<float*>(packed_);
    for (int group = 0; group < 4; group++) {
      const float* rows[16];
      for (int i = 0; i < 16; i++) {
        const char* row = block_->rows[group * 16 + i];
        prefetch(group * 16 + i);
        if (table_.stored == Stored::float32 || bytes != 4 * steps) {
          char* space = reinterpret_cast<char*>(wide_) + i * row_;
          narrow_row(row, space, 4 * steps);
          row = space;
        }
        rows[i] = reinterpret_cast<const float*>(row);
      }
      to_panel(rows, steps, panels + group * 16 * steps);
    }
    return panels;
  }

  template <int n>
  FASTDIFF_INLINE void compare(int64_t q, int64_t first_item, const Vec sums[n][kVectors]) {
    constexpr uint32_t kAll = (1u << kLanes) - 1u;
    const float* const threshold = thresholds() + q;
    uint32_t below = kAll;
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
      Vec highest = sums[i][0];
#pragma GCC unroll 4
      for (int v = 1; v < kVectors; v++) highest = max(highest, sums[i][v]);
      below &= bits(greater(set1(threshold[i]), highest));
    }
    if (__builtin_expect(below == kAll, 1)) return;
    float* const out = reinterpret_cast<float*>(sums_);
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) store(out + i * kItems + v * kLanes, sums[i][v]);
    }
    keep_reaching<n>(q, first_item);
  }

  // Of n queries, whose sums were put aside.
  template <int n>
  __attribute__((noinline)) void keep_reaching(int64_t q, int64_t first_item) {
    const float* sums = reinterpret_cast<const float*>(sums_);
    for (int i = 0; i < n; i++, sums += kItems) {
      const Vec threshold = set1(thresholds()[q + i]);
      uint64_t hits = 0;
      for (int v = 0; v < kVectors; v++) {
        const uint32_t below = bits(greater(threshold, load(sums + v * kLanes)));
        hits |= static_cast<uint64_t>(~below & ((1u << kLanes) - 1u)) << (v * kLanes);
      }
      if (hits != 0) keep_hits(q + i, first_item, hits, sums);
    }
  }

  // Of one query the rows `hits`, a bit for each from `first_item` on, which have these scores.
  FASTDIFF_INLINE void keep_hits(int64_t q, int64_t first_item, uint64_t hits, const float* scores) {
#if defined(__AVX512F__)
    Kept& kept = slot_.kept[q];
    if (kept.count + kItems < kept.capacity && block_->numbers == nullptr) {
      hits &= block_->valid;
      const __m512 room = _mm512_set1_ps(slack(q));
      __m512i number = _mm512_add_epi32(_mm512_set1_epi32(block_->first),
                                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      for (int at = 0; at < kItems; at += 16, hits >>= 16) {
        const __mmask16 some = static_cast<__mmask16>(hits);
        const __m512 score = _mm512_maskz_compress_ps(some, _mm512_load_ps(scores + at));
        _mm512_storeu_ps(kept.low + kept.count, _mm512_sub_ps(score, room));
        _mm512_storeu_ps(kept.high + kept.count, _mm512_add_ps(score, room));
        _mm512_storeu_si512(kept.row + kept.count, _mm512_maskz_compress_epi32(some, number));
        kept.count += __builtin_popcountll(hits & 0xffff);
        number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
      }
      return;
    }
#endif
    for (; hits != 0; hits &= hits - 1) {
      const int i = __builtin_ctzll(hits);
      keep(q, first_item + i, scores[i]);
    }
  }

  template <int n>
  void float32_tile(int64_t q, int64_t item, const float* panel) {
    Vec sums[n][kVectors];
    dot_float32<n>(panel, queries_.floats + q * dim_, dim_, sums);
    compare<n>(q, item, sums);
  }

  template <int n>
  struct Size {
    static constexpr int kSize = n;
  };

  // All queries in tiles, tile(Size, first query): as few as can be, and none much smaller than the others.
  template <class Tile>
  FASTDIFF_INLINE void for_tiles(const Tile& tile) {
    int64_t q = 0;
    const auto take = [&](auto size) __attribute__((always_inline)) {
      tile(size, q);
      q += size.kSize;
    };
    if constexpr (kQueries == 6) {
      while (queries_.n - q > 8 || queries_.n - q == 6) take(Size<6>{});
      while (queries_.n - q > 5) take(Size<4>{});
      switch (queries_.n - q) {
        case 5:
          return take(Size<5>{});
        case 4:
          return take(Size<4>{});
        case 3:
          return take(Size<3>{});
        default:
          break;
      }
    }
    while (queries_.n - q >= 2) take(Size<2>{});
    if (queries_.n > q) take(Size<1>{});
  }

#if defined(__AVX512F__)
  // Rows one by one, for each query 16 at a time.
  template <class Number>
  void few() {
    for (int64_t group = 0; group < kBlock; group += 16) {
      for (int64_t i = 0; i < 16; i++) prefetch(group + i);
      for (int64_t q = 0; q < queries_.n; q++) {
        __m512 scores = dot_rows<Number>(block_->rows + group, queries_.floats + q * dim_, dim_);
        if (is_scaled(table_.stored)) scores = _mm512_mul_ps(scores, _mm512_set1_ps(block_->bound.scale));
        const __m512 threshold = _mm512_set1_ps(thresholds()[q]);
        const uint32_t hits = bits(Mask{_mm512_cmp_ps_mask(scores, threshold, _CMP_GE_OQ)});
        if (__builtin_expect(hits == 0, 1)) continue;
        _mm512_store_ps(reinterpret_cast<float*>(sums_), scores);
        keep_few(q, group, hits);
      }
    }
  }

  __attribute__((noinline)) void keep_few(int64_t q, int64_t group, uint32_t hits) {
    const float* scores = reinterpret_cast<const float*>(sums_);
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      keep(q, group + lane, scores[lane]);
    }
  }
#endif

#if defined(__AVX512VNNI__)
  void few_int8() {
    for (int64_t group = 0; group < kBlock; group += 16) {
      for (int64_t i = 0; i < 16; i++) prefetch(group + i);
      for (int64_t q = 0; q < queries_.n; q++) {
        const __m512i sums = dot_rows_int8(block_->rows + group, queries_.words + q * queries_.steps, dim_);
        const __m512i threshold = _mm512_set1_epi32(whole_thresholds()[q]);
        const uint32_t hits = bits(Mask{_mm512_cmpge_epi32_mask(sums, threshold)});
        if (__builtin_expect(hits == 0, 1)) continue;
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(queries_.zero[q])));
        const __m512 scale = _mm512_set1_ps(queries_.scale[q] * block_->bound.scale);
        _mm512_store_ps(reinterpret_cast<float*>(sums_), _mm512_mul_ps(whole, scale));
        keep_few(q, group, hits);
      }
    }
  }
#endif

  void float32() {
#if defined(__AVX512F__)
    if (queries_.n <= kFew && table_.stored == Stored::float32) return few<float>();
    if (queries_.n <= kFew && table_.stored == Stored::bfloat16) return few<uint16_t>();
    if (queries_.n <= kFew && table_.stored == Stored::float16) return few<Float16>();
#endif
    const float* panels = wide_panels();
    for (int64_t item = 0; item < kBlock; item += kItems) {
      const float* panel = panels + item * dim_;
      for_tiles([&](auto size, int64_t q) { float32_tile<size.kSize>(q, item, panel); });
    }
  }

#if defined(__AVX512BF16__)
  template <int n>
  void bfloat16_tile(int64_t q, const float* panel) {
    Vec sums[n][kVectors];
    dot_bfloat16<n>(panel, queries_.words + q * queries_.steps, queries_.steps, sums);
    compare<n>(q, 0, sums);
  }

  void bfloat16() {
    const float* panel = word_panels();
    for_tiles([&](auto size, int64_t q) { bfloat16_tile<size.kSize>(q, panel); });
  }
#else
  void bfloat16() {}
#endif

#if defined(__AVX512VNNI__)
  template <int n>
  void int8_tile(int64_t q, const float* panel) {
    __m512i sums[n][kVectors];
    dot_int8<n>(panel, queries_.words + q * queries_.steps, queries_.steps, sums);
    const int32_t* const threshold = whole_thresholds() + q;
    uint32_t reach = 0;
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
      const __m512i highest =
          _mm512_max_epi32(_mm512_max_epi32(sums[i][0], sums[i][1]), _mm512_max_epi32(sums[i][2], sums[i][3]));
      reach |= bits(Mask{_mm512_cmpge_epi32_mask(highest, _mm512_set1_epi32(threshold[i]))});
    }
    if (__builtin_expect(reach == 0, 1)) return;
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) _mm512_store_si512(sums_ + 4 * i * kItems + 64 * v, sums[i][v]);
    }
    keep_whole_reaching<n>(q);
  }

  template <int n>
  __attribute__((noinline)) void keep_whole_reaching(int64_t q) {
    char* sums = sums_;
    for (int i = 0; i < n; i++, sums += 4 * kItems) {
      const __m512i threshold = _mm512_set1_epi32(whole_thresholds()[q + i]);
      uint64_t hits = 0;
      for (int v = 0; v < kVectors; v++) {
        const uint32_t some = bits(Mask{_mm512_cmpge_epi32_mask(_mm512_load_si512(sums + 64 * v), threshold)});
        hits |= static_cast<uint64_t>(some) << (16 * v);
      }
      if (hits == 0) continue;
      const __m512i zero = _mm512_set1_epi32(queries_.zero[q + i]);
      const __m512 scale = _mm512_set1_ps(queries_.scale[q + i] * block_->bound.scale);
      for (int v = 0; v < kVectors; v++) {
        const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + 64 * v), zero);
        _mm512_store_ps(sums + 64 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
      }
      keep_hits(q + i, 0, hits, reinterpret_cast<const float*>(sums));
    }
  }

  void int8() {
    if (queries_.n <= kFew) return few_int8();
    const float* panel = word_panels();
    for_tiles([&](auto size, int64_t q) { int8_tile<size.kSize>(q, panel); });
  }
#else
  void int8() {}
#endif
};

}  // namespace
}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
