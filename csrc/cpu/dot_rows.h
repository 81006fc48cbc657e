// Products of rows as they lie in memory with one query: for a few queries, whose rows are read once and not worth
// being brought into another form.
//
//     float32 queries with float32, bfloat16, float16 and int8 rows, and int8 queries with int8 rows (vpdpbusd)
#pragma once

#include "dot_panel.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

#if defined(__AVX512F__)

// The sum of the lanes of each of 16 vectors.
FASTDIFF_INLINE __m512 sums_of_lanes(const __m512 v[16]) {
  __m512 pairs[8], quads[4];
  for (int i = 0; i < 8; i++) {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]));
}

FASTDIFF_INLINE __m512i sums_of_lanes(const __m512i v[16]) {
  __m512i pairs[8], quads[4];
  for (int i = 0; i < 8; i++) {
    const __m512i a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; i++) {
    const __m512i a = pairs[2 * i], b = pairs[2 * i + 1];
    quads[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]));
}

// 16 floats of a row, or the first of them.
FASTDIFF_INLINE __m512 row_floats(const float* row, int64_t at, __mmask16 here) {
  return _mm512_maskz_loadu_ps(here, row + at);
}
FASTDIFF_INLINE __m512 row_floats(const uint16_t* row, int64_t at, __mmask16 here) {
  const __m256i halves = _mm256_maskz_loadu_epi16(here, row + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
struct Float16 {
  uint16_t bits;
};
FASTDIFF_INLINE __m512 row_floats(const Float16* row, int64_t at, __mmask16 here) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, row + at));
}
FASTDIFF_INLINE __m512 row_floats(const uint8_t* row, int64_t at, __mmask16 here) {  // 128 + the number
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, row + at)));
}

// 16 rows, without the scale of float16 and int8; of int8 rows the numbers are 128 too high each.
template <class Number>
FASTDIFF_INLINE __m512 dot_rows(const char* const* rows, const float* query, int64_t dim) {
  __m512 sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
  for (int64_t at = 0; at < dim; at += 16) {
    const __mmask16 here = dim - at < 16 ? static_cast<__mmask16>((1u << (dim - at)) - 1u) : 0xffff;
    const __m512 q = _mm512_maskz_loadu_ps(here, query + at);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      sums[i] = _mm512_fmadd_ps(row_floats(reinterpret_cast<const Number*>(rows[i]), at, here), q, sums[i]);
    }
  }
  return sums_of_lanes(sums);
}

#endif

#if defined(__AVX512VNNI__)

// To each word the products of its four numbers, unsigned by signed. GCC 12 moves the sums of a tile to memory and back
// in every step where this is the intrinsic.
FASTDIFF_INLINE __m512i add_products(__m512i sum, __m512i row, __m512i query) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(query));
  return sum;
}

// 16 unsigned rows; a query of ceil(dim / 4) words, signed, zero beyond dim
FASTDIFF_INLINE __m512i dot_rows_int8(const char* const* rows, const uint32_t* query, int64_t dim) {
  __m512i sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + 64 <= dim; at += 64) {
    const __m512i q = _mm512_loadu_si512(query + at / 4);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = add_products(sums[i], _mm512_loadu_si512(rows[i] + at), q);
  }
  if (at < dim) {
    const __mmask64 here = (uint64_t{1} << (dim - at)) - 1u;
    const __mmask16 words = static_cast<__mmask16>((1u << ((dim - at + 3) / 4)) - 1u);
    const __m512i q = _mm512_maskz_loadu_epi32(words, query + at / 4);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = add_products(sums[i], _mm512_maskz_loadu_epi8(here, rows[i] + at), q);
  }
  return sums_of_lanes(sums);
}

#endif

#if defined(__AMX_TILE__)

// Of one query: tiles 0 to 3 are sums [16, 1], 4 to 6 rows [16, 64 bytes], 7 words of the query [16, 1].
struct alignas(64) NarrowTileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {4, 4, 4, 4, 64, 64, 64, 4};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 64 rows, `apart` bytes from one to the next, by one query of the tiles' form (its first word): sums [64].
template <bool int8>
FASTDIFF_INLINE void dot_with_narrow_tiles(const char* rows, int64_t apart, const uint32_t* query, int64_t steps,
                                           float* sums) {
  asm volatile("" ::: "memory");  // see dot_with_tiles
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++) {
    const char* at = rows + 64 * step;
    _tile_loadd(7, query + 256 * step, 64);
    _tile_loadd(4, at, apart);
    _tile_loadd(5, at + 16 * apart, apart);
    if (int8) {
      _tile_dpbusd(0, 4, 7);
      _tile_dpbusd(1, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(1, 5, 7);
    }
    _tile_loadd(6, at + 32 * apart, apart);
    _tile_loadd(4, at + 48 * apart, apart);
    if (int8) {
      _tile_dpbusd(2, 6, 7);
      _tile_dpbusd(3, 4, 7);
    } else {
      _tile_dpbf16ps(2, 6, 7);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, 4);
  _tile_stored(1, sums + 16, 4);
  _tile_stored(2, sums + 32, 4);
  _tile_stored(3, sums + 48, 4);
}

#endif

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
