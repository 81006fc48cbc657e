#include "score_topk_queries.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastdiff {
namespace topk {
namespace {

// vdpbf16ps is worth it where it is faster than float32 arithmetic, which is so on AMD's processors, not on Intel's.
bool fast_bfloat16() {
#if defined(__x86_64__)
  static const bool amd = [] {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == 0x68747541;  // "Auth"
  }();
  return amd;
#else
  return false;
#endif
}

uint32_t bfloat16_bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
}

float from_bfloat16(uint32_t bits) {
  const uint32_t word = bits << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

float up(double value) { return static_cast<float>(value * (1.0 + 0x1p-20) + 0x1p-120); }

}  // namespace

Product product_for(const Table& table, Few few) {
  const Level now = level();
  const Stored stored = table.stored;
  if (stored == Stored::float16) return Product::float32;
  if (few == Few::queries_of_small_table) {
    if (stored == Stored::float32) return Product::float32;
    if (now >= Level::amx && table.row_bytes % 64 == 0) {
      return stored == Stored::int8 ? Product::int8_tiles : Product::bfloat16_tiles;
    }
    return stored == Stored::int8 && now >= Level::avx512_vnni ? Product::int8 : Product::float32;
  }
  if (few == Few::queries && (stored == Stored::float32 || (stored == Stored::bfloat16 && now < Level::amx))) {
    return Product::float32;  // that needs no rounding
  }
  if (stored == Stored::int8) {
    if (now >= Level::amx) return Product::int8_tiles;
    return now >= Level::avx512_vnni ? Product::int8 : Product::float32;
  }
  if (now >= Level::amx) return Product::bfloat16_tiles;
  if (now >= Level::avx512_bf16 && fast_bfloat16()) return Product::bfloat16;
  return Product::float32;
}

Prepared::Prepared(const Search& search, const std::vector<int64_t>& which, Product product, Stored stored,
                   bool residual, double largest_norm)
    : n_(static_cast<int64_t>(which.size())),
      padded_(round_up(n_, kTile)),
      dim_(search.scan.dim),
      floats_(product == Product::float32 ? padded_ * dim_ : 0),
      factors_(4 * padded_),
      zero_(padded_) {
  const bool int8 = product == Product::int8 || product == Product::int8_tiles;
  const bool tiles = product == Product::bfloat16_tiles || product == Product::int8_tiles;
  const int64_t per_word = int8 ? 4 : 2;
  if (product != Product::float32) {
    steps_ = (dim_ + per_word - 1) / per_word;
    if (tiles) steps_ = round_up(steps_, 16);
    words_ = Aligned<uint32_t>(padded_ * steps_);
    words_.fill(0);
  } else {
    std::fill(&floats_[n_ * dim_], &floats_[padded_ * dim_], 0.0f);
  }
  factors_.fill(0.0f);
  zero_.fill(0);
  float *by_residual = factors_.get(), *by_norm = by_residual + padded_, *tiny = by_norm + padded_,
        *scale = tiny + padded_;
  std::fill(scale, scale + padded_, 1.0f);
  const double unit = product == Product::bfloat16 || product == Product::bfloat16_tiles ? 0x1p-22 : 0x1p-24;
  const double terms = static_cast<double>(dim_ + 16) * unit, gamma = terms / (1.0 - terms);
  for (int64_t i = 0; i < n_; i++) {
    const float* query = search.queries + which[static_cast<size_t>(i)] * dim_;
    double norm = 0.0, lost = 0.0;
    for (int64_t k = 0; k < dim_; k++) norm += static_cast<double>(query[k]) * static_cast<double>(query[k]);
    norm = std::sqrt(norm);
    if (product == Product::float32) {
      std::copy(query, query + dim_, &floats_[i * dim_]);
    } else if (int8) {
      float largest = 0.0f;
      for (int64_t k = 0; k < dim_; k++) largest = std::max(largest, std::fabs(query[k]));
      scale[i] = std::max(largest / 127.0f, 0x1p-60f);
      const float inverse = 1.0f / scale[i];
      int32_t sum = 0;
      for (int64_t k = 0; k < dim_; k++) {
        const float whole = std::min(127.0f, std::max(-127.0f, std::nearbyint(query[k] * inverse)));
        const double miss =
            static_cast<double>(query[k]) - static_cast<double>(whole) * static_cast<double>(scale[i]);
        lost += miss * miss;
        sum += static_cast<int32_t>(whole);
        const uint32_t byte = static_cast<uint8_t>(static_cast<int8_t>(whole));
        word(i, k / 4, tiles) |= byte << (8 * (k % 4));
      }
      zero_[i] = 128 * sum;
    } else {
      for (int64_t k = 0; k < dim_; k++) {
        const uint32_t half = bfloat16_bits(query[k]);
        const double miss = static_cast<double>(query[k]) - static_cast<double>(from_bfloat16(half));
        lost += miss * miss;
        word(i, k / 2, tiles) |= half << (16 * (k % 2));
      }
    }
    lost = std::sqrt(lost);
    if (!search.certified) continue;
    const bool rounded = !(product == Product::float32 && stored == Stored::float32);  // whether rows lose anything
    by_residual[i] = rounded && residual ? up(norm) : 0.0f;
    by_norm[i] = up(lost + (norm + lost) * gamma + (rounded && !residual ? norm * 0x1.01p-8 : 0.0));
    const double d = static_cast<double>(dim_);
    tiny[i] = up(0x1p-124 * (2.0 * d + 1.0 + std::sqrt(d) * (norm + largest_norm)));
  }
}

Queries Prepared::view() const {
  Queries queries;
  queries.n = n_;
  queries.n_padded = padded_;
  queries.floats = floats_.get();
  queries.words = words_.get();
  queries.steps = steps_;
  queries.by_residual = factors_.get();
  queries.by_norm = factors_.get() + padded_;
  queries.tiny = factors_.get() + 2 * padded_;
  queries.scale = factors_.get() + 3 * padded_;
  queries.zero = zero_.get();
  return queries;
}

}  // namespace topk
}  // namespace fastdiff
