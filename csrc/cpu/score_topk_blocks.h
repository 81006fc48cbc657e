// What scans with vectors and with tiles share: blocks of rows, what a score must reach, and what is kept.
#pragma once

#include <cstring>

#include "dot_panel.h"
#include "score_topk.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {  // a Block is something else in other files

using namespace topk;  // of the scans alone: no other file includes this one

constexpr int kTogether = 4;   // blocks that few queries take at a time
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

// The scans derive from it: one block, or a few, are at work at a time.
class Blocks {
 protected:
  explicit Blocks(const ScanArgs& args)
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

  // of the block at work
  char* threshold_space() { return thresholds_ + (block_ - blocks_) * 4 * queries_.n_padded; }
  float* thresholds() { return reinterpret_cast<float*>(threshold_space()); }

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
}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
