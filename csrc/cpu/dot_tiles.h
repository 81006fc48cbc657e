// Products of a panel of rows with a few queries in registers, one per kind of product and level.
//
//     float32    any level                 bfloat16   vdpbf16ps       int8   vpdpbusd
//
// A tile is kQueries queries by kItems rows: `sums[query][vector]`. The sum of a (query, row) pair does not depend on
// what else is in the tile.
#pragma once

#include "dot_rows.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

#if defined(__AVX512F__)
constexpr int kQueries = 6, kItems = 64;
#elif defined(__AVX2__)
constexpr int kQueries = 6, kItems = 16;
#else
constexpr int kQueries = 2, kItems = 16;
#endif
constexpr int kVectors = kItems / kLanes;
constexpr int kPerPanel = 16 / kLanes;  // vectors of one panel's word

// panel: kItems / 16 panels of [words, 16], one behind the other; queries [n, words]
template <int n>
FASTDIFF_INLINE void dot_float32(const float* panel, const float* query, int64_t words, Vec sums[n][kVectors]) {
#pragma GCC unroll 6
  for (int q = 0; q < n; q++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sums[q][v] = zero();
  }
  const int64_t apart = words * 16;
  for (int64_t word = 0; word < words; word++) {
    Vec item[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      item[v] = load(panel + word * 16 + v / kPerPanel * apart + v % kPerPanel * kLanes);
    }
#pragma GCC unroll 6
    for (int q = 0; q < n; q++) {
      const Vec one = set1(query[q * words + word]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[q][v] = fma(item[v], one, sums[q][v]);
    }
  }
}

#if defined(__AVX512VNNI__)

// rows unsigned, queries signed
template <int n>
FASTDIFF_INLINE void dot_int8(const float* panel, const uint32_t* query, int64_t words, __m512i sums[n][kVectors]) {
#pragma GCC unroll 6
  for (int q = 0; q < n; q++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sums[q][v] = _mm512_setzero_si512();
  }
  const int64_t apart = words * 16;
  for (int64_t word = 0; word < words; word++) {
    __m512i item[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) item[v] = _mm512_load_si512(panel + word * 16 + v * apart);
#pragma GCC unroll 6
    for (int q = 0; q < n; q++) {
      const __m512i one = _mm512_set1_epi32(static_cast<int>(query[q * words + word]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[q][v] = add_products(sums[q][v], item[v], one);
    }
  }
}

#endif

#if defined(__AVX512BF16__)

template <int n>
FASTDIFF_INLINE void dot_bfloat16(const float* panel, const uint32_t* query, int64_t words, Vec sums[n][kVectors]) {
#pragma GCC unroll 6
  for (int q = 0; q < n; q++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sums[q][v] = zero();
  }
  const int64_t apart = words * 16;
  for (int64_t word = 0; word < words; word++) {
    __m512bh item[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) item[v] = (__m512bh)_mm512_load_ps(panel + word * 16 + v * apart);
#pragma GCC unroll 6
    for (int q = 0; q < n; q++) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(static_cast<int>(query[q * words + word]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[q][v].v = _mm512_dpbf16_ps(sums[q][v].v, item[v], one);
    }
  }
}

#endif

#if defined(__AMX_TILE__)

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <bool int8>
FASTDIFF_INLINE __m512i higher(__m512i a, __m512i b) {
  return int8 ? _mm512_max_epi32(a, b)
              : _mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}

// Of rows first .. last - 1 of sums [16, 16], column by column.
template <bool int8>
FASTDIFF_INLINE __m512i highest_of_rows(const char* sums, int first, int last) {
  __m512i even = _mm512_load_si512(sums + 64 * first), odd = _mm512_load_si512(sums + 64 * first + 64);
  for (int row = first + 2; row < last; row += 2) {
    even = higher<int8>(even, _mm512_load_si512(sums + 64 * row));
    odd = higher<int8>(odd, _mm512_load_si512(sums + 64 * row + 64));
  }
  return higher<int8>(even, odd);
}

// 64 rows, `apart` bytes from one to the next, by 16 queries: sums [64, 16]. Every tile is 16 by 64 bytes. Meanwhile
// the vectors look at sums that were made before, if any: the highest of each 16 rows.
template <bool int8>
FASTDIFF_INLINE void dot_with_tiles(const char* rows, int64_t apart, const uint32_t* queries, int64_t steps, char* sums,
                                    const char* before, __m512i highest[4]) {
  // GCC 12's tile loads do not say that they read memory: without this, rows and queries may be written after them
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++) {
    const char* at = rows + 64 * step;
    const bool look = before != nullptr && step == 0;
    _tile_loadd(7, queries + 256 * step, 64);
    _tile_loadd(4, at, apart);
    if (int8) {
      _tile_dpbusd(0, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 7);
    }
    if (look) highest[0] = highest_of_rows<int8>(before, 0, 16);
    _tile_loadd(5, at + 16 * apart, apart);
    if (int8) {
      _tile_dpbusd(1, 5, 7);
    } else {
      _tile_dpbf16ps(1, 5, 7);
    }
    if (look) highest[1] = highest_of_rows<int8>(before + 1024, 0, 16);
    _tile_loadd(6, at + 32 * apart, apart);
    if (int8) {
      _tile_dpbusd(2, 6, 7);
    } else {
      _tile_dpbf16ps(2, 6, 7);
    }
    if (look) highest[2] = highest_of_rows<int8>(before + 2048, 0, 16);
    _tile_loadd(4, at + 48 * apart, apart);
    if (int8) {
      _tile_dpbusd(3, 4, 7);
    } else {
      _tile_dpbf16ps(3, 4, 7);
    }
    if (look) highest[3] = highest_of_rows<int8>(before + 3072, 0, 16);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 1024, 64);
  _tile_stored(2, sums + 2048, 64);
  _tile_stored(3, sums + 3072, 64);
}

#endif

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
