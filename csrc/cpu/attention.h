// Attention of one query over the keys of one user, head by head, with keys and values in panels.
//
// What a query gathers depends on its own keys, in index order, and on nothing else: scores are chains over the head's
// dims, the largest score is exact in any order, and lanes beyond the last key weigh exactly 0.
#pragma once

#include "linear.h"
#include "transformer.h"

namespace fastdiff {

// The keys and values of one sequence, room for n_keys of them:
//     keys    [heads][ceil(n_keys / 16)][width][16]        values  [heads][ceil(width / 16)][n_keys][16]
struct KeyPanels {
  float* keys;
  float* values;
  int heads, width, n_keys;

  int key_panels() const { return padded(n_keys) / kPanel; }
  int value_panels() const { return padded(width) / kPanel; }
};

inline int64_t key_floats(int heads, int width, int n_keys) { return int64_t{1} * heads * width * padded(n_keys); }
inline int64_t value_floats(int heads, int width, int n_keys) { return int64_t{1} * heads * padded(width) * n_keys; }

// What `attend` needs beside its arguments.
inline int64_t attend_floats(int heads, int n_keys) { return int64_t{1} * heads * (padded(n_keys) + 1); }

namespace FASTDIFF_LEVEL {

// Zeros in the lanes of the last panels that no key is put into: they are read, and weigh nothing.
inline void clear_key_tails(const KeyPanels& panels) {
  const int n_panels = panels.key_panels();
  for (int head = 0; head < panels.heads; head++) {
    float* last = panels.keys + (static_cast<int64_t>(head + 1) * n_panels - 1) * panels.width * kPanel;
    for (int i = 0; i < panels.width * kPanel; i++) last[i] = 0.0f;
  }
}

// Key number `at` and its value, both [heads * width].
inline void put_key(const KeyPanels& panels, int at, const float* key, const float* value) {
  const int width = panels.width, n_panels = panels.key_panels();
  float* to = panels.keys + static_cast<int64_t>(at / kPanel) * width * kPanel + at % kPanel;
  for (int head = 0; head < panels.heads; head++) {
    float* of_head = to + static_cast<int64_t>(head) * n_panels * width * kPanel;
    for (int d = 0; d < width; d++) of_head[static_cast<int64_t>(d) * kPanel] = key[head * width + d];
  }
  float* of_panel = panels.values + static_cast<int64_t>(at) * kPanel;
  for (int head = 0; head < panels.heads; head++) {
    for (int d = 0; d < width; d += kPanel, of_panel += static_cast<int64_t>(panels.n_keys) * kPanel) {
      const int n = width - d < kPanel ? width - d : kPanel;
      for (int i = 0; i < n; i++) of_panel[i] = value[head * width + d + i];
      for (int i = n; i < kPanel; i++) of_panel[i] = 0.0f;
    }
  }
}

// sums[v] = sum_p weights[v][p] values[v][p] for G vectors of values, each with its head's weights.
template <int G>
FASTDIFF_INLINE void gather_vectors(const float* const* weights, const float* const* values, int n_keys, Vec* sums) {
  Vec total[G];
  for (int g = 0; g < G; g++) total[g] = zero();
  for (int p = 0; p < n_keys; p++) {
    for (int g = 0; g < G; g++) total[g] = fma(set1(weights[g][p]), load(values[g] + p * kPanel), total[g]);
  }
  for (int g = 0; g < G; g++) sums[g] = total[g];
}

FASTDIFF_INLINE float largest(Vec a) {
  alignas(64) float lane[kLanes];
  store(lane, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

// gathered [heads * width] = softmax(query . key + bias) values over the first `seen` keys, at least one.
//
// query    [heads * width], holding its scale; with `even` it counts as 0, so that the bias alone weighs the keys
// bias     [padded(seen)] added to the scores, -inf for a key that is not there
// room     attend_floats(heads, n_keys)
inline void attend(const KeyPanels& panels, const float* query, bool even, const float* bias, int seen, float* gathered,
                   float* room) {
  const int heads = panels.heads, width = panels.width, n_panels = panels.key_panels(), step = padded(panels.n_keys);
  const int whole = padded(seen), last = seen / kLanes * kLanes;
  float* const shares = room + static_cast<int64_t>(heads) * step;
  for (int head = 0; head < heads; head++) {
    float* scores = room + static_cast<int64_t>(head) * step;
    if (even) {
      for (int at = 0; at < whole; at += kLanes) store(scores + at, load(bias + at));
    } else {
      const Linear keys = {panels.keys + static_cast<int64_t>(head) * n_panels * width * kPanel, bias, width, seen};
      linear_rows<1>(keys, query + head * width, 0, scores, 0, 0, whole / kLanes, false);
    }
  }
  for (int head = 0; head < heads; head++) {
    float* scores = room + static_cast<int64_t>(head) * step;
    for (int at = last; at < whole; at += kLanes) {
      const int n = seen - at > 0 ? seen - at : 0;
      store(scores + at, select(first_n(n), load(scores + at), set1(-__builtin_inff())));
    }
    Vec high = load(scores);
    for (int at = kLanes; at < whole; at += kLanes) high = max(high, load(scores + at));
    const Vec top = set1(largest(high));
    Vec total = zero();
    for (int at = 0; at < whole; at += kLanes) {
      const Vec weight = exp(load(scores + at) - top);
      store(scores + at, weight);
      total = total + weight;
    }
    shares[head] = 1.0f / sum(total);
  }
  constexpr int kGroup = 8;
  const int vecs_per_head = (width + kLanes - 1) / kLanes, n_vecs = heads * vecs_per_head;
  for (int first = 0; first < n_vecs; first += kGroup) {
    const float* weights[kGroup];
    const float* values[kGroup];
    Vec sums[kGroup];
    const int group = n_vecs - first < kGroup ? n_vecs - first : kGroup;
    for (int g = 0; g < group; g++) {
      const int head = (first + g) / vecs_per_head, d = (first + g) % vecs_per_head * kLanes;
      const int64_t panel = static_cast<int64_t>(head) * panels.value_panels() + d / kPanel;
      weights[g] = room + static_cast<int64_t>(head) * step;
      values[g] = panels.values + panel * panels.n_keys * kPanel + d % kPanel;
    }
    int done = 0;
    if (group == kGroup) gather_vectors<kGroup>(weights, values, seen, sums), done = kGroup;
    for (; done + 4 <= group; done += 4) gather_vectors<4>(weights + done, values + done, seen, sums + done);
    for (; done < group; done++) gather_vectors<1>(weights + done, values + done, seen, sums + done);
    for (int g = 0; g < group; g++) {
      const int head = (first + g) / vecs_per_head, d = (first + g) % vecs_per_head * kLanes;
      const int n = width - d < kLanes ? width - d : kLanes;
      store_n(gathered + head * width + d, sums[g] * set1(shares[head]), n);
    }
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
