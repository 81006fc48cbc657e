// Philox4x32-10 and Box-Muller, in the layout of fastdiff/noise.py: the normals of (seed, row key, sample, draw, dim).
//
// A lane holds one counter, that is four dims. The counters of one row and one draw differ in their last word alone, so
// the first rounds, as far as they do not see that word, are the same for all lanes and done once.
#pragma once

#include "vecmath.h"

namespace fastdiff {

// The seed's words and what the ten rounds make of them.
struct PhiloxKeys {
  uint32_t low[10], high[10];
};

namespace FASTDIFF_LEVEL {

FASTDIFF_INLINE PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t i = 0; i < 10; i++) {
    keys.low[i] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
    keys.high[i] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
  }
  return keys;
}

constexpr int kNormalsAtOnce = 4 * kLanes;

// dim rounded up to what fill_normals writes
constexpr int padded_normals(int dim) { return (dim + kNormalsAtOnce - 1) / kNormalsAtOnce * kNormalsAtOnce; }

struct PhiloxWords {
  IVec w[4];
};

// The words of counters (row key, draw, sample << 16 | j), for the kLanes j of `even` and `odd`, the last words of the
// counters in even and in odd lanes.
FASTDIFF_INLINE PhiloxWords philox_words(const PhiloxKeys& keys, uint64_t row_key, uint32_t draw, LVec even, LVec odd) {
  constexpr uint32_t kBy0 = 0xD2511F53u, kBy1 = 0xCD9E8D57u;
  // round 0: only word 2 depends on j
  const uint64_t row_0 = static_cast<uint64_t>(static_cast<uint32_t>(row_key)) * kBy0;
  const uint64_t draw_1 = static_cast<uint64_t>(draw) * kBy1;
  const uint32_t a0 = static_cast<uint32_t>(draw_1 >> 32) ^ static_cast<uint32_t>(row_key >> 32) ^ keys.low[0];
  const uint32_t a1 = static_cast<uint32_t>(draw_1), a2 = static_cast<uint32_t>(row_0 >> 32) ^ keys.high[0];
  const uint32_t a3 = static_cast<uint32_t>(row_0);
  // round 1: words 0 and 1 do; round 2: all but words 0 and 1, which come from word 2 of round 1
  const uint64_t b_0 = static_cast<uint64_t>(a0) * kBy0;
  const uint32_t b2 = static_cast<uint32_t>(b_0 >> 32) ^ a3 ^ keys.high[1], b3 = static_cast<uint32_t>(b_0);
  const uint64_t c_1 = static_cast<uint64_t>(b2) * kBy1;
  const LVec by0 = lset1(kBy0), by1 = lset1(kBy1);
  LVec c[4][2];
  for (int half = 0; half < 2; half++) {
    const LVec word2 = xor3(half ? odd : even, lset1(a2), lset1(0));
    const LVec b_1 = multiply_low(word2, by1);
    const LVec b0 = xor3(high_words(b_1), lset1(a1), lset1(keys.low[1]));
    const LVec c_0 = multiply_low(b0, by0);
    c[0][half] = xor3(b_1, lset1(static_cast<uint32_t>(c_1 >> 32)), lset1(keys.low[2]));  // b1 is b_1's low word
    c[1][half] = lset1(static_cast<uint32_t>(c_1));
    c[2][half] = xor3(high_words(c_0), lset1(b3), lset1(keys.high[2]));
    c[3][half] = c_0;
  }
  for (int i = 3; i < 10; i++) {
    const LVec low = lset1(keys.low[i]), high = lset1(keys.high[i]);
    for (int half = 0; half < 2; half++) {
      const LVec p0 = multiply_low(c[0][half], by0), p1 = multiply_low(c[2][half], by1);
      c[0][half] = xor3(high_words(p1), c[1][half], low);
      c[2][half] = xor3(high_words(p0), c[3][half], high);
      c[1][half] = p1;
      c[3][half] = p0;
    }
  }
  PhiloxWords words;
  for (int i = 0; i < 4; i++) words.w[i] = join_low(c[i][0], c[i][1]);
  return words;
}

// The powers of two of u and v go into the logarithm's exponent and the angle's factor: the results are the same.
FASTDIFF_INLINE void box_muller(IVec a, IVec b, Vec& first, Vec& second) {
  const Vec u = to_float(shift_right<8>(a) + iset1(1));
  const Vec angle = to_float(shift_right<8>(b)) * set1(6.2831855f * 5.9604644775390625e-8f);
  const Vec radius = sqrt(set1(-2.0f) * log<24>(u));
  Vec sine, cosine;
  sincos(angle, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Counters whose words are worked out before any is made normal: the long chains of both halves then overlap.
constexpr int kCountersAhead = 16;

// The normals of draws first_draw .. + draws - 1 of each row, of dims first .. last - 1 and on to a multiple of
// kNormalsAtOnce: draw d, row r from out + (d rows + r) row_step on. `first` is such a multiple.
inline void fill_normals(const PhiloxKeys& keys, const int64_t* row_key, const int64_t* sample, int rows,
                         uint32_t first_draw, int draws, int first, int last, float* out, int64_t row_step) {
  alignas(64) uint64_t even[kLanes / 2], odd[kLanes / 2];
  for (int i = 0; i < kLanes / 2; i++) {
    even[i] = static_cast<uint64_t>(four_in_turn(2 * i));
    odd[i] = static_cast<uint64_t>(four_in_turn(2 * i + 1));
  }
  const LVec first_even = lload(even), first_odd = lload(odd);
  PhiloxWords words[kCountersAhead];
  float* places[kCountersAhead];
  int held = 0;
  const auto finish = [&] {
    for (int i = 0; i < held; i++) {
      Vec normals[4];
      box_muller(words[i].w[0], words[i].w[1], normals[0], normals[1]);
      box_muller(words[i].w[2], words[i].w[3], normals[2], normals[3]);
      store_in_turn(places[i], normals[0], normals[1], normals[2], normals[3]);
    }
    held = 0;
  };
  for (int draw = 0; draw < draws; draw++) {
    for (int row = 0; row < rows; row++) {
      float* const to = out + (static_cast<int64_t>(draw) * rows + row) * row_step;
      const uint32_t upper = static_cast<uint32_t>(sample[row]) << 16;
      for (int at = first; at < last; at += kNormalsAtOnce) {
        const LVec block = lset1(upper | static_cast<uint32_t>(at / 4));  // has zeros where lanes have bits
        words[held] = philox_words(keys, static_cast<uint64_t>(row_key[row]), first_draw + static_cast<uint32_t>(draw),
                                   xor3(first_even, block, lset1(0)), xor3(first_odd, block, lset1(0)));
        places[held] = to + at - first;
        if (++held == kCountersAhead) finish();
      }
    }
  }
  finish();
}

// The same for one row and one draw, from out[0] on.
inline void fill_normals(const PhiloxKeys& keys, uint64_t row_key, uint32_t sample, uint32_t draw, int first, int last,
                         float* out) {
  const int64_t key = static_cast<int64_t>(row_key), of_row = sample;
  fill_normals(keys, &key, &of_row, 1, draw, 1, first, last, out, 0);
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
