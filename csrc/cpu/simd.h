// Vectors of one instruction set. Only this file, and the dot tiles of score_topk, know instruction sets.
//
// A kernel's file is compiled once per level; the compiler's own macros say what it may use. Every level offers
//
//   Vec     kLanes floats           IVec   kLanes 32-bit words, unsigned unless a name says signed
//   Mask    kLanes truth values     kLanes 16 (AVX-512), 8 (AVX2), 4 (baseline: SSE2, NEON, through GCC's vectors)
//   LVec    kLanes / 2 words of 64 bits
//
// fma(a, b, c) = a b + c is one rounding at avx2 and avx512. At baseline it may be two, which changes the bits of a
// result between levels, never between batches or threads.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FASTDIFF_LEVEL
#define FASTDIFF_LEVEL baseline
#endif

#define FASTDIFF_INLINE inline __attribute__((always_inline))

namespace fastdiff {
namespace FASTDIFF_LEVEL {

#if defined(__AVX512F__)

constexpr int kLanes = 16;

struct Mask {
  __mmask16 m;
};
struct Vec {
  __m512 v;
};
struct IVec {
  __m512i v;
};

FASTDIFF_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
FASTDIFF_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
FASTDIFF_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTDIFF_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FASTDIFF_INLINE Vec load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p)};
}
FASTDIFF_INLINE void store_n(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), a.v);
}
FASTDIFF_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTDIFF_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
FASTDIFF_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTDIFF_INLINE Mask greater(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FASTDIFF_INLINE Mask equal(IVec a, IVec b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
FASTDIFF_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
// GCC 12 may put the word aside by storing the mask's 16 bits and read 32 of them back (seen under ThreadSanitizer at
// -O1: kmovw %k3, 0x240(%rsp); cmpl $0, 0x240(%rsp)). So the word is made in a register.
FASTDIFF_INLINE uint32_t bits(Mask m) {
  uint32_t word = m.m;
  asm("" : "+r"(word));
  return word;
}

FASTDIFF_INLINE IVec iset1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
FASTDIFF_INLINE IVec iload(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTDIFF_INLINE void istore(uint32_t* p, IVec a) { _mm512_storeu_si512(p, a.v); }
FASTDIFF_INLINE IVec operator+(IVec a, IVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator-(IVec a, IVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator^(IVec a, IVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator&(IVec a, IVec b) { return {_mm512_and_si512(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator|(IVec a, IVec b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int n>
FASTDIFF_INLINE IVec shift_left(IVec a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
FASTDIFF_INLINE IVec shift_right(IVec a) {
  return {_mm512_srli_epi32(a.v, n)};
}
// high and low words of the 64-bit products
FASTDIFF_INLINE void multiply(IVec a, IVec b, IVec& high, IVec& low) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  high.v = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low.v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
FASTDIFF_INLINE Vec to_float(IVec a) { return {_mm512_cvtepi32_ps(a.v)}; }  // of signed words
FASTDIFF_INLINE IVec to_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }    // nearest, signed words
FASTDIFF_INLINE Vec as_float(IVec a) { return {_mm512_castsi512_ps(a.v)}; }
FASTDIFF_INLINE IVec as_int(Vec a) { return {_mm512_castps_si512(a.v)}; }

struct LVec {
  __m512i v;
};
// x in the low words; what the high words hold is not specified
FASTDIFF_INLINE LVec lset1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
FASTDIFF_INLINE LVec lload(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
FASTDIFF_INLINE LVec xor3(LVec a, LVec b, LVec c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
FASTDIFF_INLINE LVec multiply_low(LVec a, LVec b) { return {_mm512_mul_epu32(a.v, b.v)}; }  // low words to 64 bits
FASTDIFF_INLINE LVec high_words(LVec a) { return {_mm512_srli_epi64(a.v, 32)}; }
// the low words: word 2 i of `even`, word 2 i + 1 of `odd`
FASTDIFF_INLINE IVec join_low(LVec even, LVec odd) {
  return {_mm512_mask_shuffle_epi32(even.v, 0xAAAA, odd.v, static_cast<_MM_PERM_ENUM>(0xA0))};
}
// p[4 j + i] = lane of (a, b, c, d)[i] that stands for j: see four_in_turn
FASTDIFF_INLINE void store_in_turn(float* p, Vec a, Vec b, Vec c, Vec d) {
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a.v, b.v));
  const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a.v, b.v));
  const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c.v, d.v));
  const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c.v, d.v));
  _mm512_storeu_ps(p, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low)));
  _mm512_storeu_ps(p + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low)));
  _mm512_storeu_ps(p + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)));
  _mm512_storeu_ps(p + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;

struct Mask {
  __m256 m;
};
struct Vec {
  __m256 v;
};
struct IVec {
  __m256i v;
};

FASTDIFF_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTDIFF_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
FASTDIFF_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
FASTDIFF_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTDIFF_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FASTDIFF_INLINE Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
FASTDIFF_INLINE void store_n(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }
FASTDIFF_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTDIFF_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTDIFF_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
FASTDIFF_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTDIFF_INLINE Mask greater(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FASTDIFF_INLINE Mask equal(IVec a, IVec b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
FASTDIFF_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
FASTDIFF_INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.m)); }

FASTDIFF_INLINE IVec iset1(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
FASTDIFF_INLINE IVec iload(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
FASTDIFF_INLINE void istore(uint32_t* p, IVec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
FASTDIFF_INLINE IVec operator+(IVec a, IVec b) { return {_mm256_add_epi32(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator-(IVec a, IVec b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator^(IVec a, IVec b) { return {_mm256_xor_si256(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator&(IVec a, IVec b) { return {_mm256_and_si256(a.v, b.v)}; }
FASTDIFF_INLINE IVec operator|(IVec a, IVec b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int n>
FASTDIFF_INLINE IVec shift_left(IVec a) {
  return {_mm256_slli_epi32(a.v, n)};
}
template <int n>
FASTDIFF_INLINE IVec shift_right(IVec a) {
  return {_mm256_srli_epi32(a.v, n)};
}
FASTDIFF_INLINE void multiply(IVec a, IVec b, IVec& high, IVec& low) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
FASTDIFF_INLINE Vec to_float(IVec a) { return {_mm256_cvtepi32_ps(a.v)}; }
FASTDIFF_INLINE IVec to_int(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
FASTDIFF_INLINE Vec as_float(IVec a) { return {_mm256_castsi256_ps(a.v)}; }
FASTDIFF_INLINE IVec as_int(Vec a) { return {_mm256_castps_si256(a.v)}; }

struct LVec {
  __m256i v;
};
FASTDIFF_INLINE LVec lset1(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
FASTDIFF_INLINE LVec lload(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
FASTDIFF_INLINE LVec xor3(LVec a, LVec b, LVec c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
FASTDIFF_INLINE LVec multiply_low(LVec a, LVec b) { return {_mm256_mul_epu32(a.v, b.v)}; }
FASTDIFF_INLINE LVec high_words(LVec a) { return {_mm256_srli_epi64(a.v, 32)}; }
FASTDIFF_INLINE IVec join_low(LVec even, LVec odd) {
  return {_mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xAA)};
}
FASTDIFF_INLINE void store_in_turn(float* p, Vec a, Vec b, Vec c, Vec d) {
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a.v, b.v));
  const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a.v, b.v));
  const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c.v, d.v));
  const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c.v, d.v));
  _mm256_storeu_ps(p, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)));
  _mm256_storeu_ps(p + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)));
  _mm256_storeu_ps(p + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)));
  _mm256_storeu_ps(p + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)));
}

#else

constexpr int kLanes = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t SignedWords __attribute__((vector_size(16)));
typedef uint64_t LongWords __attribute__((vector_size(16)));

struct Mask {
  SignedWords m;
};
struct Vec {
  Floats v;
};
struct IVec {
  Words v;
};

FASTDIFF_INLINE Vec zero() { return {Floats{0, 0, 0, 0}}; }
FASTDIFF_INLINE Vec set1(float x) { return {Floats{x, x, x, x}}; }
FASTDIFF_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FASTDIFF_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
FASTDIFF_INLINE Vec load_n(const float* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; i++) a.v[i] = p[i];
  return a;
}
FASTDIFF_INLINE void store_n(float* p, Vec a, int n) {
  for (int i = 0; i < n; i++) p[i] = a.v[i];
}
FASTDIFF_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FASTDIFF_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FASTDIFF_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FASTDIFF_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
FASTDIFF_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  for (int i = 0; i < kLanes; i++) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return {a.v * b.v + c.v};
#endif
}
FASTDIFF_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
FASTDIFF_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
FASTDIFF_INLINE Vec sqrt(Vec a) {
  for (int i = 0; i < kLanes; i++) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
// to the nearest, ties to even; |a| < 2^22
FASTDIFF_INLINE Vec round(Vec a) {
  const Floats shift = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};  // 1.5 2^23
  return {(a.v + shift) - shift};
}
FASTDIFF_INLINE Mask greater(Vec a, Vec b) { return {a.v > b.v}; }
FASTDIFF_INLINE Mask equal(IVec a, IVec b) { return {a.v == b.v}; }
FASTDIFF_INLINE Vec select(Mask m, Vec yes, Vec no) { return {m.m ? yes.v : no.v}; }
FASTDIFF_INLINE uint32_t bits(Mask m) {
  uint32_t all = 0;
  for (int i = 0; i < kLanes; i++) all |= (m.m[i] ? 1u : 0u) << i;
  return all;
}

FASTDIFF_INLINE IVec iset1(uint32_t x) { return {Words{x, x, x, x}}; }
FASTDIFF_INLINE IVec iload(const uint32_t* p) {
  IVec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FASTDIFF_INLINE void istore(uint32_t* p, IVec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
FASTDIFF_INLINE IVec operator+(IVec a, IVec b) { return {a.v + b.v}; }
FASTDIFF_INLINE IVec operator-(IVec a, IVec b) { return {a.v - b.v}; }
FASTDIFF_INLINE IVec operator^(IVec a, IVec b) { return {a.v ^ b.v}; }
FASTDIFF_INLINE IVec operator&(IVec a, IVec b) { return {a.v & b.v}; }
FASTDIFF_INLINE IVec operator|(IVec a, IVec b) { return {a.v | b.v}; }
template <int n>
FASTDIFF_INLINE IVec shift_left(IVec a) {
  return {a.v << n};
}
template <int n>
FASTDIFF_INLINE IVec shift_right(IVec a) {
  return {a.v >> n};
}
FASTDIFF_INLINE void multiply(IVec a, IVec b, IVec& high, IVec& low) {
  for (int i = 0; i < kLanes; i++) {
    const uint64_t product = static_cast<uint64_t>(a.v[i]) * b.v[i];
    high.v[i] = static_cast<uint32_t>(product >> 32);
    low.v[i] = static_cast<uint32_t>(product);
  }
}
FASTDIFF_INLINE Vec to_float(IVec a) {
  SignedWords words;
  std::memcpy(&words, &a.v, sizeof(words));
  return {__builtin_convertvector(words, Floats)};
}
FASTDIFF_INLINE IVec to_int(Vec a) {
  const SignedWords words = __builtin_convertvector(round(a).v, SignedWords);
  IVec b;
  std::memcpy(&b.v, &words, sizeof(words));
  return b;
}
FASTDIFF_INLINE Vec as_float(IVec a) {
  Vec b;
  std::memcpy(&b.v, &a.v, sizeof(b.v));
  return b;
}
FASTDIFF_INLINE IVec as_int(Vec a) {
  IVec b;
  std::memcpy(&b.v, &a.v, sizeof(b.v));
  return b;
}


struct LVec {
  LongWords v;
};
FASTDIFF_INLINE LVec lset1(uint32_t x) { return {LongWords{x, x}}; }
FASTDIFF_INLINE LVec lload(const uint64_t* p) {
  LVec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FASTDIFF_INLINE LVec xor3(LVec a, LVec b, LVec c) { return {a.v ^ b.v ^ c.v}; }
FASTDIFF_INLINE LVec multiply_low(LVec a, LVec b) {
  return {(a.v & LongWords{0xFFFFFFFFu, 0xFFFFFFFFu}) * (b.v & LongWords{0xFFFFFFFFu, 0xFFFFFFFFu})};
}
FASTDIFF_INLINE LVec high_words(LVec a) { return {a.v >> 32}; }
FASTDIFF_INLINE IVec join_low(LVec even, LVec odd) {
  const LongWords both = (even.v & LongWords{0xFFFFFFFFu, 0xFFFFFFFFu}) | (odd.v << 32);
  IVec a;
  for (int i = 0; i < kLanes / 2; i++) {
    a.v[2 * i] = static_cast<uint32_t>(both[i]);
    a.v[2 * i + 1] = static_cast<uint32_t>(both[i] >> 32);
  }
  return a;
}
FASTDIFF_INLINE void store_in_turn(float* p, Vec a, Vec b, Vec c, Vec d) {
  for (int i = 0; i < kLanes; i++) store(p + 4 * i, {Floats{a.v[i], b.v[i], c.v[i], d.v[i]}});
}

#endif

// Which j lane `lane` must stand for where store_in_turn is to write p[4 j ..]: it moves no number between the 128-bit
// parts of a vector.
constexpr int four_in_turn(int lane) { return kLanes / 4 * (lane % 4) + lane / 4; }

// a 2^n for whole n in -252 .. 254, rounded once where the result is subnormal
#if defined(__AVX512F__)
FASTDIFF_INLINE Vec scale(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
#else
FASTDIFF_INLINE Vec scale(Vec a, Vec n) {  // in two factors: 2^n alone may be too small or too large for a float
  const Vec half = round(n * set1(0.5f));
  const auto power = [](Vec m) { return as_float(shift_left<23>(to_int(m) + iset1(127))); };
  return a * power(half) * power(n - half);
}
#endif

// The sum of all lanes and the largest of them. Halves are added to halves, then quarters: a tree of its own for each
// level. `largest` is not for NaN.
#if defined(__AVX512F__)
FASTDIFF_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FASTDIFF_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
#elif defined(__AVX2__)
FASTDIFF_INLINE float sum(Vec a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
FASTDIFF_INLINE float largest(Vec a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
#else
FASTDIFF_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTDIFF_INLINE float largest(Vec a) {
  const float b = a.v[0] > a.v[2] ? a.v[0] : a.v[2], c = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return b > c ? b : c;
}
#endif

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
