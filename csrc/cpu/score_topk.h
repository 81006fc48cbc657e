// The scan of score_topk on plain pointers: which rows of a table may be among the k best of each query.
//
// No score is ever stored but those that may count. A table is read once, row by row as it lies in memory; 64 rows at a
// time are brought into the form of the product in use (in the first-level cache), multiplied with every query, and
// compared with that query's threshold:
//
//     kept:  score + slack >= floor,   slack = by_residual residual + by_norm norm + tiny
//
// `floor` is a score that k rows surely reach, and `slack` bounds what the scan may be wrong by (the formula is
// explained in fastdiff/ops/topk_scan.py), so what is not kept cannot be among the k best.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {
namespace topk {

// Always inlined: a copy that the linker kept could be of a higher level than the machine's.
#define FASTDIFF_TOPK_INLINE inline __attribute__((always_inline))

constexpr int64_t kBlock = 64;  // rows that share one bound and one scale
constexpr int64_t kTile = 16;   // queries are padded to whole tiles

// How the rows of a table are stored. float16 and int8 are quotients of the number and the block's scale; int8 is
// 128 + the rounded quotient, unsigned.
enum class Stored : int { float32 = 0, bfloat16 = 1, int8 = 2, float16 = 3 };

FASTDIFF_TOPK_INLINE constexpr int64_t bytes_of(Stored stored) {
  return stored == Stored::float32 ? 4 : stored == Stored::int8 ? 1 : 2;
}

FASTDIFF_TOPK_INLINE constexpr bool is_scaled(Stored stored) {
  return stored == Stored::int8 || stored == Stored::float16;
}

// How rows and queries are multiplied; `tiles` are AMX's, the others vectors.
enum class Product : int { float32 = 0, bfloat16, int8, bfloat16_tiles, int8_tiles };

// Of the rows of a block: the largest |row| and |row as scanned|, the largest |row - row as scanned| (of float32 rows:
// as rounded to bfloat16), and the scale of int8 and float16 rows.
struct Bound {
  float norm, residual, scale, unused;
};

struct Table {
  Stored stored;
  const char* const* chunks;  // row r is row r % 2^chunk_shift of chunk r / 2^chunk_shift
  int chunk_shift;            // at least 6
  int64_t row_bytes;          // from one row to the next
  int64_t n_rows, dim;
  const Bound* bounds;  // [ceil(n_rows / 64)]

  FASTDIFF_TOPK_INLINE const char* row(int64_t r) const {
    return chunks[r >> chunk_shift] + (r & ((int64_t{1} << chunk_shift) - 1)) * row_bytes;
  }
};

// What a scan keeps for one query: scores surely at least `low` and at most `high`.
struct Kept {
  float* low;
  float* high;
  int32_t* row;
  int64_t count, capacity;
};

// The queries in the form of the product. Those beyond n, up to n_padded, are zeros with a floor of infinity.
struct Queries {
  int64_t n, n_padded;    // n_padded: a multiple of 16
  const float* floats;    // float32: [n_padded, dim]
  const uint32_t* words;  // bfloat16, int8: [n_padded, steps]; tiles: [n_padded / 16, steps / 16, 16, 16], query last
  int64_t steps;          // words of a row: pairs of bfloat16, four of int8; a multiple of 16 for tiles
  const float *by_residual, *by_norm, *tiny;  // [n_padded]
  const float* scale;                         // int8: score = scale[q] * bound.scale * (sum - zero[q])
  const int32_t* zero;
};

// What one thread has found.
struct Slot {
  float* floor;   // [n_padded], never falling
  Kept* kept;     // [n_padded]
  char* scratch;  // scratch_bytes, 64-byte aligned
  void* owner;
  void (*full)(Slot& slot, int64_t query);  // raises the floor and makes room in `kept`
};

struct ScanArgs {
  Table table;
  Product product;
  const int32_t* some;  // [n_some], ascending: only these rows, 64 at a time; null: all
  int64_t n_some;
  Queries queries;
  const uint64_t* allowed;  // a bit per row, a word per block (of the rows as scanned); null: all
  int64_t first_block, last_block;
  Slot* slot;
};

FASTDIFF_TOPK_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// 16 rows in float32, 4 times 64 in the form of the product, their results, and 4 thresholds per query.
FASTDIFF_TOPK_INLINE int64_t scratch_bytes(int64_t dim, int64_t n_padded) {
  const int64_t row = round_up(4 * dim, 64) + 64;
  return kTile * row + 4 * kBlock * row + row + 2 * kBlock * kTile * 4 + 16 * n_padded + 1024;
}

struct ExactArgs {
  const float* query;  // [dim]
  const char* items;   // float32 rows
  int64_t row_bytes, dim;
  const int32_t* rows;  // [n]; null: first .. first + n - 1
  int64_t first, n;
  float* scores;   // [n]
  float* scratch;  // [16 dim], 64-byte aligned
};

// One slice of a table: its bounds, and its rows as they are stored.
struct PackArgs {
  const char* items;  // float32 rows [n_rows, dim]; a whole number of blocks but for the last slice
  int64_t row_bytes, dim, n_rows;
  Stored stored;
  char* rows;     // bfloat16, float16 or int8 [n_rows, dim]; null for float32
  Bound* bounds;  // [ceil(n_rows / 64)]
};

}  // namespace topk

FASTDIFF_KERNEL_ALL(void, topk_scan, (const topk::ScanArgs&))

}  // namespace fastdiff
