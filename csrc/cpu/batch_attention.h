// Attention of several queries at once over the same keys, head by head, as two packed linear layers: scores = Q K^T,
// and what is gathered = weights V. A query's result does not depend on the queries beside it.
#pragma once

#include "linear.h"
#include "transformer.h"

namespace fastdiff {

// The keys and values of one sequence, packed as the weights of linear layers are:
//     keys    [heads][ceil(n_keys / 16)][width][16]        values  [heads][ceil(width / 16)][n_keys][16]
struct KeyPanels {
  float* keys;
  float* values;
  int heads, width, n_keys;

  int64_t keys_per_head() const { return int64_t{1} * padded(n_keys) * width; }
  int64_t values_per_head() const { return int64_t{1} * padded(width) * n_keys; }
  int64_t key_floats() const { return heads * keys_per_head(); }
  int64_t value_floats() const { return heads * values_per_head(); }
};

namespace FASTDIFF_LEVEL {

// Zeros behind the last key: they are read, and weigh nothing.
inline void clear_tails(const KeyPanels& panels) {
  const int64_t last = int64_t{1} * panels.width * kPanel;
  for (int head = 0; head < panels.heads; head++) {
    float* end = panels.keys + (head + 1) * panels.keys_per_head();
    for (float* at = end - last; at < end; at++) *at = 0.0f;
  }
}

// Key number `at` and its value, both [heads * width].
inline void put_key(const KeyPanels& panels, int at, const float* key, const float* value) {
  const int width = panels.width;
  for (int head = 0; head < panels.heads; head++, key += width, value += width) {
    float* to = panels.keys + head * panels.keys_per_head() + int64_t{1} * (at / kPanel) * width * kPanel + at % kPanel;
    for (int d = 0; d < width; d++) to[d * kPanel] = key[d];
    to = panels.values + head * panels.values_per_head() + int64_t{1} * at * kPanel;
    for (int d = 0; d < width; d += kPanel, to += int64_t{1} * panels.n_keys * kPanel) {
      const int n = width - d < kPanel ? width - d : kPanel;
      for (int i = 0; i < n; i++) to[i] = value[d + i];
      for (int i = n; i < kPanel; i++) to[i] = 0.0f;
    }
  }
}

// scores = softmax of the first `seen`, at least one, and 0 up to the next whole panel. A NaN makes NaN of all. Weights
// under e^-87 count as 0: a processor takes a hundred cycles to make a subnormal number.
inline void softmax_row(float* scores, int seen) {
  const int whole = padded(seen);
  for (int at = seen / kLanes * kLanes; at < whole; at += kLanes) {
    const int left = seen - at > 0 ? seen - at : 0;
    store(scores + at, select(first_n(left), load(scores + at), set1(-__builtin_inff())));
  }
  Vec high = load(scores);
  for (int at = kLanes; at < whole; at += kLanes) high = max(high, load(scores + at));
  const Vec top = set1(largest(high)), lowest = set1(-87.0f);
  Vec total = zero();
  for (int at = 0; at < whole; at += kLanes) {
    const Vec x = load(scores + at) - top;
    const Vec weight = select(greater(lowest, x), zero(), exp(max(lowest, x)));
    store(scores + at, weight);
    total = total + weight;
  }
  const Vec by = set1(1.0f / sum(total));
  for (int at = 0; at < whole; at += kLanes) store(scores + at, load(scores + at) * by);
}

// Row i gathers from the first min(first_seen + i, n_keys) keys. queries hold their scale; rows of gathered are
// gathered_step apart, which is at least heads * width and a panel: what lies behind the heads is overwritten.
// scores: rows * padded(n_keys) floats.
inline void attend_rows(const KeyPanels& panels, const float* queries, int64_t query_step, int rows, int first_seen,
                        float* gathered, int64_t gathered_step, float* scores) {
  const int width = panels.width, n_keys = panels.n_keys, step = padded(n_keys);
  for (int head = 0; head < panels.heads; head++) {
    const Linear keys = {panels.keys + head * panels.keys_per_head(), nullptr, width, n_keys};
    linear_spread(keys, queries + head * width, query_step, rows, scores, step);
    for (int row = 0; row < rows; row++) {
      float* of_row = scores + int64_t{1} * row * step;
      const int seen = first_seen < n_keys - row ? first_seen + row : n_keys;
      softmax_row(of_row, seen);
      for (int at = padded(seen); at < step; at += kLanes) store(of_row + at, zero());
    }
    const Linear values = {panels.values + head * panels.values_per_head(), nullptr, n_keys, width};
    linear_spread(values, scores, step, rows, gathered + head * width, gathered_step);
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
