// levels: baseline avx2 avx512 avx512_vnni avx512_bf16 amx
#include "dot_rows.h"
#include "dot_tiles.h"
#include "score_topk.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

using namespace topk;

constexpr int kTogether = 4;   // blocks that few queries take at a time
constexpr int64_t kFew = 3;    // up to so many queries take rows one by one where they lie
constexpr int64_t kAhead = 2;  // blocks from the one at work to the one that is fetched into the second-level cache

// One block of 64 rows on its way through the scan.
struct Block {
  const char* rows[kBlock];  // beyond the last row: a row of zeros
  int32_t first;             // the number of the first row, where they lie one behind the other
  const int32_t* numbers;    // or the numbers of all
  uint64_t valid;            // a bit per row that may be kept
  bool in_place;             // the rows are evenly spaced
  Bound bound;
};

class Scan {
 public:
  explicit Scan(const ScanArgs& args)
      : args_(args), table_(args.table), queries_(args.queries), slot_(*args.slot), dim_(args.table.dim) {
    char* at = slot_.scratch;
    const int64_t row = round_up(4 * dim_, 64) + 64;
    wide_ = reinterpret_cast<float*>(at);
    packed_ = at += kTile * row;
    zeros_ = at += kTogether * kBlock * row;
    sums_ = at += row;
    thresholds_ = at += 2 * kBlock * kTile * 4;
    row_ = row;
    std::memset(zeros_, table_.stored == Stored::int8 ? 128 : 0, static_cast<size_t>(row));
  }

  void run() {
    const bool whole_tiles = args_.product == Product::bfloat16_tiles || args_.product == Product::int8_tiles;
    if (whole_tiles) return run_tiles();
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
  // of the block at work
  char* threshold_space() { return thresholds_ + (block_ - blocks_) * 4 * queries_.n_padded; }
  float* thresholds() { return reinterpret_cast<float*>(threshold_space()); }
  int32_t* whole_thresholds() { return reinterpret_cast<int32_t*>(threshold_space()); }

  void run_tiles() {
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

  // --- rows ----------------------------------------------------------------------------------------------------------

  // False where no row of the block may be kept.
  bool open(int64_t block) {
    const int64_t first = block * kBlock, n = args_.some == nullptr ? table_.n_rows : args_.n_some;
    const int64_t here = n - first < kBlock ? n - first : kBlock;
    block_->valid = here == kBlock ? ~uint64_t{0} : (uint64_t{1} << here) - 1u;
    if (args_.allowed != nullptr) block_->valid &= args_.allowed[block];
    if (block_->valid == 0) return false;
    block_->first = static_cast<int32_t>(first);
    block_->in_place = here == kBlock && args_.some == nullptr;
    if (args_.some == nullptr) {
      block_->numbers = nullptr;
      block_->bound = table_.bounds[block];
      const char* row = table_.row(first);
      block_->rows[0] = row;
      if (in_tiles_ && block_->in_place) return true;
      for (int64_t i = 1; i < here; i++) block_->rows[i] = row + i * table_.row_bytes;
    } else {
      block_->numbers = args_.some + first;
      block_->bound = Bound{0.0f, 0.0f, 0.0f, 0.0f};
      for (int64_t i = 0; i < here; i++) {
        const int64_t number = block_->numbers[i];
        const Bound& bound = table_.bounds[number / kBlock];
        if (bound.norm > block_->bound.norm) block_->bound.norm = bound.norm;
        if (bound.residual > block_->bound.residual) block_->bound.residual = bound.residual;
        block_->rows[i] = table_.row(number);
      }
      for (int64_t i = here; i < kBlock && first + i < args_.n_some; i++) block_->rows[i] = zeros_;
    }
    for (int64_t i = here; i < kBlock; i++) block_->rows[i] = zeros_;
    return true;
  }

  // Row i of the block after the next, while row i of this one is read.
  FASTDIFF_INLINE void prefetch(int64_t i) const {
#if defined(__AVX2__)
    const int64_t ahead = block_->first + kAhead * kBlock + i;
    const char* row;
    if (args_.some != nullptr) {
      if (ahead >= args_.n_some) return;
      row = table_.row(args_.some[ahead]);
    } else {
      if (ahead >= table_.n_rows) return;
      row = table_.row(ahead);
    }
    for (int64_t at = 0; at < table_.row_bytes; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
#else
    (void)i;
#endif
  }

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

  // A row as bfloat16 or as it is stored, padded to `width` bytes. A padded query is zero there.
  FASTDIFF_INLINE void narrow_row(const char* row, char* out, int64_t width) const {
    const int64_t bytes = dim_ * (table_.stored == Stored::int8 ? 1 : 2);
    if (table_.stored != Stored::float32) {
      std::memcpy(out, row, static_cast<size_t>(bytes));
    } else {
#if defined(__AVX512BF16__)
      const float* from = reinterpret_cast<const float*>(row);
      int64_t i = 0;
      for (; i + 32 <= dim_; i += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
        _mm512_storeu_si512(out + 2 * i, (__m512i)both);
      }
      if (i < dim_) narrow_bfloat16(from + i, dim_ - i, reinterpret_cast<uint16_t*>(out) + i);
#else
      narrow_bfloat16(reinterpret_cast<const float*>(row), dim_, reinterpret_cast<uint16_t*>(out));
#endif
    }
    if (width > bytes) std::memset(out + bytes, 0, static_cast<size_t>(width - bytes));
  }

  // --- thresholds ----------------------------------------------------------------------------------------------------

  float slack(int64_t q) const {
    return queries_.by_residual[q] * block_->bound.residual + queries_.by_norm[q] * block_->bound.norm +
           queries_.tiny[q];
  }

  bool whole() const { return args_.product == Product::int8 || args_.product == Product::int8_tiles; }

  // slack of kLanes queries
  FASTDIFF_INLINE Vec slacks(int64_t q) const {
    return load(queries_.by_residual + q) * set1(block_->bound.residual) +
           load(queries_.by_norm + q) * set1(block_->bound.norm) + load(queries_.tiny + q);
  }

  void set_thresholds() {
    float* out = thresholds();
    for (int64_t q = 0; q < queries_.n_padded; q += kLanes) store(out + q, load(slot_.floor + q) - slacks(q));
#if defined(__AVX512VNNI__)
    if (!whole()) return;
    // sum >= zero + (floor - slack) / (scales), rounded down by more than the division may round up
    const Vec scale = set1(block_->bound.scale), most = set1(0x1p30f), least = set1(-0x1p30f);
    for (int64_t q = 0; q < queries_.n_padded; q += 16) {
      Vec low = min(most, max(least, load(out + q) / (load(queries_.scale + q) * scale)));
      low = low - (Vec{_mm512_abs_ps(low.v)} * set1(0x1p-20f) + set1(1.0f));
      const __m512i sum = _mm512_add_epi32(_mm512_cvttps_epi32(low.v), _mm512_loadu_si512(queries_.zero + q));
      _mm512_storeu_si512(threshold_space() + 4 * q, sum);
    }
#endif
  }

  // --- what is kept --------------------------------------------------------------------------------------------------

  FASTDIFF_INLINE void keep(int64_t q, int64_t i, float score) {
    if (!((block_->valid >> i) & 1u)) return;
    const float room = slack(q), high = score + room;
    if (!(high >= slot_.floor[q])) return;
    const int32_t number = block_->numbers == nullptr ? block_->first + static_cast<int32_t>(i) : block_->numbers[i];
    Kept& kept = slot_.kept[q];
    kept.low[kept.count] = score - room;
    kept.high[kept.count] = high;
    kept.row[kept.count] = number;
    if (++kept.count == kept.capacity) slot_.full(slot_, q);
  }

  float score_of(int64_t q, int32_t sum) const {
    return static_cast<float>(sum - queries_.zero[q]) * (queries_.scale[q] * block_->bound.scale);
  }

  // --- products with vectors -----------------------------------------------------------------------------------------

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

  // --- products with AMX's tiles -------------------------------------------------------------------------------------

#if defined(__AMX_TILE__)
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
#else
  template <bool int8>
  void tiles(int) {}
#endif

  const ScanArgs& args_;
  const Table& table_;
  const Queries& queries_;
  Slot& slot_;
  const int64_t dim_;
  int64_t row_;
  float* wide_;
  char *packed_, *zeros_, *sums_, *thresholds_;
  bool in_tiles_ = false;  // whether blocks that lie in memory as the tiles want them are left there
  Block blocks_[kTogether];
  Block* block_ = blocks_;
};

}  // namespace

void topk_scan(const ScanArgs& args) {
#if defined(__AMX_TILE__)
  const bool tiles = args.product == Product::bfloat16_tiles || args.product == Product::int8_tiles;
  if (tiles) {
    // constant data: GCC 12 believes that the instruction reads 8 bytes, and leaves out the writing of the others
    static constexpr TileShapes kShapes;
    _tile_loadconfig(&kShapes);
  }
  Scan(args).run();
  if (tiles) _tile_release();
#else
  Scan(args).run();
#endif
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
