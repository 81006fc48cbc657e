// levels: baseline avx2 avx512
#include "dot_panel.h"
#include "score_topk_exact.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

// A product of two float32 is exact in float64, so it does not matter whether it is fused with the sum.
void topk_exact(const topk::ExactArgs& args) {
  const int64_t dim = args.dim;
  for (int64_t at = 0; at < args.n; at += 16) {
    const int64_t here = args.n - at < 16 ? args.n - at : 16;
    const float* rows[16];
    for (int64_t i = 0; i < 16; i++) {
      const int64_t j = at + (i < here ? i : 0);
      rows[i] = reinterpret_cast<const float*>(args.items +
                                               (args.rows == nullptr ? args.first + j : args.rows[j]) * args.row_bytes);
    }
#if defined(__AVX2__)
    if (args.rows != nullptr) {
      for (int64_t j = at + 16; j < at + 32 && j < args.n; j++) {
        const char* row = args.items + args.rows[j] * args.row_bytes;
        for (int64_t byte = 0; byte < 4 * dim; byte += 64) _mm_prefetch(row + byte, _MM_HINT_T0);
      }
    }
#endif
    to_panel(rows, dim, args.scratch);
    alignas(64) float scores[16];
#if defined(__AVX512F__)
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int64_t k = 0; k < dim; k++) {
      const __m512d q = _mm512_set1_pd(static_cast<double>(args.query[k]));
      low = _mm512_fmadd_pd(q, _mm512_cvtps_pd(_mm256_load_ps(args.scratch + k * 16)), low);
      high = _mm512_fmadd_pd(q, _mm512_cvtps_pd(_mm256_load_ps(args.scratch + k * 16 + 8)), high);
    }
    _mm256_store_ps(scores, _mm512_cvtpd_ps(low));
    _mm256_store_ps(scores + 8, _mm512_cvtpd_ps(high));
#else
    double sums[16] = {};
    for (int64_t k = 0; k < dim; k++) {
      const double q = static_cast<double>(args.query[k]);
      for (int i = 0; i < 16; i++) sums[i] += q * static_cast<double>(args.scratch[k * 16 + i]);
    }
    for (int i = 0; i < 16; i++) scores[i] = static_cast<float>(sums[i]);
#endif
    for (int64_t i = 0; i < here; i++) args.scores[at + i] = scores[i] + 0.0f;
  }
}

float topk_floor(const float* values, int64_t n, int64_t k) {
  float low = values[0], high = values[0];
  for (int64_t i = 1; i < n; i++) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  for (int look = 0; look < 40; look++) {
    const float middle = low + 0.5f * (high - low);
    if (!(middle > low && middle < high)) break;
    int32_t count = 0;
    for (int64_t i = 0; i < n; i++) count += values[i] >= middle;
    if (count < k) {
      high = middle;
    } else {
      low = middle;
      if (count <= k + k / 32) break;
    }
  }
  return low;
}

int64_t topk_prune(topk::Kept& kept, float floor) {
  int64_t left = 0;
#if defined(__AVX512F__)
  const __m512 threshold = _mm512_set1_ps(floor);
  for (int64_t i = 0; i < kept.count; i += 16) {
    const __mmask16 here = kept.count - i < 16 ? static_cast<__mmask16>((1u << (kept.count - i)) - 1u) : 0xffff;
    const __m512 low = _mm512_maskz_loadu_ps(here, kept.low + i), high = _mm512_maskz_loadu_ps(here, kept.high + i);
    const __m512i row = _mm512_maskz_loadu_epi32(here, kept.row + i);
    const __mmask16 stay = _mm512_mask_cmp_ps_mask(here, high, threshold, _CMP_GE_OQ);
    const int n = __builtin_popcount(stay);
    const __mmask16 first = static_cast<__mmask16>((1u << n) - 1u);
    _mm512_mask_storeu_ps(kept.low + left, first, _mm512_maskz_compress_ps(stay, low));
    _mm512_mask_storeu_ps(kept.high + left, first, _mm512_maskz_compress_ps(stay, high));
    _mm512_mask_storeu_epi32(kept.row + left, first, _mm512_maskz_compress_epi32(stay, row));
    left += n;
  }
#else
  for (int64_t i = 0; i < kept.count; i++) {
    const float low = kept.low[i], high = kept.high[i];
    const int32_t row = kept.row[i];
    kept.low[left] = low;
    kept.high[left] = high;
    kept.row[left] = row;
    left += high >= floor;
  }
#endif
  return kept.count = left;
}

namespace {

float up(double value) { return static_cast<float>(value * (1.0 + 0x1p-20) + 0x1p-120); }

struct Norms {
  double row, scanned, residual;  // squared
};

// Four chains, because the compiler may not make them itself.
Norms norms(const float* row, const float* scanned, int64_t dim) {
  double r[8] = {}, s[8] = {}, d[8] = {};
  int64_t i = 0;
  for (; i + 8 <= dim; i += 8) {
    for (int j = 0; j < 8; j++) {
      const double a = static_cast<double>(row[i + j]), b = static_cast<double>(scanned[i + j]);
      r[j] += a * a;
      s[j] += b * b;
      d[j] += (a - b) * (a - b);
    }
  }
  for (; i < dim; i++) {
    const double a = static_cast<double>(row[i]), b = static_cast<double>(scanned[i]);
    r[0] += a * a;
    s[0] += b * b;
    d[0] += (a - b) * (a - b);
  }
  Norms sum = {0.0, 0.0, 0.0};
  for (int j = 0; j < 8; j++) {
    sum.row += r[j];
    sum.scanned += s[j];
    sum.residual += d[j];
  }
  return sum;
}

}  // namespace

void topk_pack(const topk::PackArgs& args) {
  using namespace topk;
  constexpr int64_t kPiece = 256;  // of a row at a time
  const int64_t dim = args.dim;
  for (int64_t first = 0; first < args.n_rows; first += kBlock) {
    const int64_t here = args.n_rows - first < kBlock ? args.n_rows - first : kBlock;
    Bound& bound = args.bounds[first / kBlock];
    bound = Bound{0.0f, 0.0f, 1.0f, 0.0f};
    float inverse = 1.0f;
    if (is_scaled(args.stored)) {
      float largest = 0.0f;
      for (int64_t i = 0; i < here; i++) {
        const float* row = reinterpret_cast<const float*>(args.items + (first + i) * args.row_bytes);
        for (int64_t k = 0; k < dim; k++) {
          const float size = __builtin_fabsf(row[k]);
          largest = size > largest ? size : largest;
        }
      }
      uint32_t word;
      std::memcpy(&word, &largest, 4);
      word &= 0x7f800000u;
      float power;  // of two, the largest not above
      std::memcpy(&power, &word, 4);
      const float scale = args.stored == Stored::float16 ? power * 0x1p-14f : largest / 127.0f;
      bound.scale = scale > 0x1p-60f ? scale : 0x1p-60f;
      inverse = 1.0f / bound.scale;
    }
    double norm = 0.0, residual = 0.0;
    for (int64_t i = 0; i < here; i++) {
      const float* row = reinterpret_cast<const float*>(args.items + (first + i) * args.row_bytes);
      Norms sum = {0.0, 0.0, 0.0};
      for (int64_t k = 0; k < dim; k += kPiece) {
        const int64_t piece = dim - k < kPiece ? dim - k : kPiece;
        float scanned[kPiece];
        if (args.stored == Stored::int8) {
          uint8_t* out = reinterpret_cast<uint8_t*>(args.rows) + (first + i) * dim + k;
          for (int64_t j = 0; j < piece; j++) {
            float x = row[k + j] * inverse;
            x = x < -127.0f ? -127.0f : x;
            x = x > 127.0f ? 127.0f : x;
            x = (x + 12582912.0f) - 12582912.0f;  // to the nearest whole number
            out[j] = static_cast<uint8_t>(static_cast<int32_t>(x) + 128);
            scanned[j] = x * bound.scale;
          }
        } else if (args.stored == Stored::float16) {
          uint16_t half[kPiece];
          for (int64_t j = 0; j < piece; j++) scanned[j] = row[k + j] * inverse;
          narrow_float16(scanned, piece, half);
          widen_float16(reinterpret_cast<const char*>(half), bound.scale, piece, scanned);
          std::memcpy(args.rows + 2 * ((first + i) * dim + k), half, static_cast<size_t>(2 * piece));
        } else {
          uint16_t half[kPiece];
          narrow_bfloat16(row + k, piece, half);
          widen_bfloat16(reinterpret_cast<const char*>(half), piece, scanned);
          if (args.stored == Stored::bfloat16) {
            std::memcpy(args.rows + 2 * ((first + i) * dim + k), half, static_cast<size_t>(2 * piece));
          }
        }
        const Norms more = norms(row + k, scanned, piece);
        sum.row += more.row;
        sum.scanned += more.scanned;
        sum.residual += more.residual;
      }
      const double larger = sum.row > sum.scanned ? sum.row : sum.scanned;
      norm = larger > norm ? larger : norm;
      residual = sum.residual > residual ? sum.residual : residual;
    }
    bound.norm = up(__builtin_sqrt(norm));
    bound.residual = up(__builtin_sqrt(residual));
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
