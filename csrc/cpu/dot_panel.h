// Rows brought into the form of a product: 16 rows side by side, a 32-bit word of each after the other.
//
//     panel[word][row],  a word being a float, a pair of bfloat16, or four int8
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

#if defined(__AVX512F__)

// 16 vectors of 16 words, rows to columns
FASTDIFF_INLINE void transpose(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// rows [16] of n_words words each -> panel [n_words, 16]
inline void to_panel(const float* const* rows, int64_t n_words, float* panel) {
  for (int64_t at = 0; at < n_words; at += 16) {
    const int64_t left = n_words - at < 16 ? n_words - at : 16;
    __m512 block[16];
    if (left == 16) {
      for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_ps(rows[i] + at);
      transpose(block);
      for (int i = 0; i < 16; i++) _mm512_store_ps(panel + (at + i) * 16, block[i]);
    } else {
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1u);
      for (int i = 0; i < 16; i++) block[i] = _mm512_maskz_loadu_ps(mask, rows[i] + at);
      transpose(block);
      for (int i = 0; i < left; i++) _mm512_store_ps(panel + (at + i) * 16, block[i]);
    }
  }
}

#else

inline void to_panel(const float* const* rows, int64_t n_words, float* panel) {
  int64_t at = 0;
#if defined(__AVX2__)
  for (; at + 8 <= n_words; at += 8) {
    for (int half = 0; half < 16; half += 8) {
      __m256 r[8], t[8];
      for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows[half + i] + at);
      for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
      }
      for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
      }
      for (int i = 0; i < 4; i++) {
        _mm256_store_ps(panel + (at + i) * 16 + half, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
        _mm256_store_ps(panel + (at + 4 + i) * 16 + half, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
      }
    }
  }
#endif
  for (int i = 0; i < 16; i++) {
    for (int64_t word = at; word < n_words; word++) std::memcpy(panel + word * 16 + i, rows[i] + word, 4);
  }
}

#endif

// --- rows as they are stored, in float32 -----------------------------------------------------------------------------

inline void widen_bfloat16(const char* row, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i++) {
    uint16_t half;
    std::memcpy(&half, row + 2 * i, 2);
    const uint32_t word = static_cast<uint32_t>(half) << 16;
    std::memcpy(out + i, &word, 4);
  }
}

// float16 numbers, finite, times the scale; float32 has room for each of them, subnormal ones included
inline void widen_float16(const char* row, float scale, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i++) {
    uint16_t half;
    std::memcpy(&half, row + 2 * i, 2);
    const uint32_t word = static_cast<uint32_t>(half & 0x7fffu) << 13, sign = static_cast<uint32_t>(half >> 15) << 31;
    float x;
    std::memcpy(&x, &word, 4);
    x *= 0x1p112f;  // what the exponents' biases differ by
    x *= scale;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits |= sign;
    std::memcpy(out + i, &bits, 4);
  }
}

inline void widen_int8(const char* row, float scale, int64_t dim, float* out) {
  const uint8_t* number = reinterpret_cast<const uint8_t*>(row);
  for (int64_t i = 0; i < dim; i++) out[i] = scale * static_cast<float>(static_cast<int>(number[i]) - 128);
}

// float32 to bfloat16, to nearest, ties to even; finite numbers below 2^127
inline void narrow_bfloat16(const float* row, int64_t dim, uint16_t* out) {
  for (int64_t i = 0; i < dim; i++) {
    uint32_t word;
    std::memcpy(&word, row + i, 4);
    out[i] = static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
}

// float32 to float16, to nearest, ties to even; numbers below 2^16
inline void narrow_float16(const float* row, int64_t dim, uint16_t* out) {
  for (int64_t i = 0; i < dim; i++) {
    uint32_t word;
    std::memcpy(&word, row + i, 4);
    const uint32_t sign = word >> 31 << 15;
    word &= 0x7fffffffu;
    const uint32_t normal = ((word + 0xfffu + ((word >> 13) & 1u)) >> 13) - (112u << 10);
    float x;
    std::memcpy(&x, &word, 4);
    x += 0.5f;  // whose last bit is that of a subnormal float16
    uint32_t low;
    std::memcpy(&low, &x, 4);
    low -= 0x3f000000u;
    out[i] = static_cast<uint16_t>(sign | (word < 0x38800000u ? low : normal));  // 2^-14
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
