// Attention of one query over the keys of one user, head by head.
//
// What a query gathers depends on its own keys, in index order, and on nothing else: scores are chains over the head's
// dims, the largest score is the same in any order, and lanes beyond the last key weigh exactly 0.
#pragma once

#include "linear.h"
#include "rows.h"
#include "transformer.h"

namespace fastdiff {

// The keys and values of one sequence, room for n_keys of them. Keys are turned, so that scores come out side by side:
//     keys    [heads][width][padded(n_keys)]        values  [heads][n_keys][padded(width)]
struct KeyValues {
  float* keys;
  float* values;
  int heads, width, n_keys;

  FASTDIFF_INLINE int key_step() const { return padded(n_keys); }
  FASTDIFF_INLINE int64_t values_of_head() const { return int64_t{1} * n_keys * padded(width); }
  // heads first .. last - 1 alone
  FASTDIFF_INLINE KeyValues some(int first, int last) const {
    return {keys + int64_t{1} * first * width * key_step(), values + first * values_of_head(), last - first, width,
            n_keys};
  }
};

FASTDIFF_INLINE int64_t key_floats(int heads, int width, int n_keys) {
  return int64_t{1} * heads * width * padded(n_keys);
}
FASTDIFF_INLINE int64_t value_floats(int heads, int width, int n_keys) {
  return int64_t{1} * heads * padded(width) * n_keys;
}

// What `attend` needs beside its arguments.
FASTDIFF_INLINE int64_t attend_floats(int heads, int n_keys) {
  return int64_t{1} * heads * padded(n_keys) + 4 * padded(heads);
}

// The same for attend_causal.
FASTDIFF_INLINE int64_t attend_causal_floats(int n_keys) { return int64_t{kMostRows} * padded(n_keys); }

namespace FASTDIFF_LEVEL {

// Zeros at the places of keys `first` .. padded(n_keys) - 1: they are read, and weigh nothing.
inline void clear_keys(const KeyValues& cache, int first) {
  for (int row = 0; row < cache.heads * cache.width; row++) {
    float* keys = cache.keys + static_cast<int64_t>(row) * cache.key_step();
    for (int at = first; at < cache.key_step(); at++) keys[at] = 0.0f;
  }
}

// Keys number first .. first + n - 1 and their values, each [heads * width], the rows `step` floats apart.
inline void put_keys(const KeyValues& cache, int first, int n, const float* key, const float* value, int64_t step) {
  const int heads = cache.heads, width = cache.width, to_step = cache.key_step(), wide = padded(width);
  for (int done = 0; done < n; done += kPanel) {  // so many rows stay in the nearest cache while they are turned
    const int some = n - done < kPanel ? n - done : kPanel;
    for (int row = 0; row < heads * width; row++) {
      float* to = cache.keys + static_cast<int64_t>(row) * to_step + first + done;
      const float* from = key + done * step + row;
      for (int at = 0; at < some; at++) to[at] = from[at * step];
    }
  }
  for (int head = 0; head < heads; head++) {
    float* to = cache.values + head * cache.values_of_head() + static_cast<int64_t>(first) * wide;
    const float* from = value + head * width;
    for (int at = 0; at < n; at++, to += wide, from += step) {
      for (int d = 0; d < width; d++) to[d] = from[d];
      for (int d = width; d < wide; d++) to[d] = 0.0f;
    }
  }
}

// e^x of a score below the largest, x <= 0. What is under e^-60 counts as 0, as no sum of weights shows it: a processor
// takes a hundred cycles to make a subnormal number, and its products with values could be one too.
FASTDIFF_INLINE Vec weight_of(Vec x) {
  const Vec lowest = set1(-60.0f), y = max(lowest, x);
  const Vec n = round(y * set1(1.44269504f));
  Vec r = fma(n, set1(-0.693359375f), y);  // ln 2 in two parts
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.39517186e-3f);
  p = fma(p, r, set1(8.36959854e-3f));
  p = fma(p, r, set1(4.16661873e-2f));
  p = fma(p, r, set1(1.66665122e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r * r, r) + set1(1.0f);
  return select(greater(lowest, x), zero(), p * power_of_two(n));
}

// scores[h][..] = bias + sum_d query[h][d] key[h][d][..] for HG heads and V vectors of keys.
template <int HG, int V>
FASTDIFF_INLINE void score_block(const float* query, const float* keys, int width, int step, const float* bias,
                                 float* scores) {
  Vec sums[HG][V];
  for (int h = 0; h < HG; h++) {
    for (int v = 0; v < V; v++) sums[h][v] = load(bias + v * kLanes);
  }
  const float* at = keys;
  for (int d = 0; d < width; d++, at += step) {
    for (int h = 0; h < HG; h++) {
      const Vec by = set1(query[h * width + d]);
      for (int v = 0; v < V; v++) {
        sums[h][v] = fma(by, load(at + static_cast<int64_t>(h) * width * step + v * kLanes), sums[h][v]);
      }
    }
  }
  for (int h = 0; h < HG; h++) {
    for (int v = 0; v < V; v++) store(scores + h * step + v * kLanes, sums[h][v]);
  }
}

template <int V>
inline void score_vectors(const KeyValues& cache, const float* query, int first, const float* bias, float* scores) {
  constexpr int kHeads = V <= 2 ? 4 : 2;
  const int step = cache.key_step(), width = cache.width;
  const float* keys = cache.keys + first;
  int head = 0;
  for (; head + kHeads <= cache.heads; head += kHeads) {
    score_block<kHeads, V>(query + head * width, keys + static_cast<int64_t>(head) * width * step, width, step,
                           bias + first, scores + head * step + first);
  }
  for (; head < cache.heads; head++) {
    score_block<1, V>(query + head * width, keys + static_cast<int64_t>(head) * width * step, width, step, bias + first,
                      scores + head * step + first);
  }
}

// gathered[h][..] = (sum_p weights[h][p] values[p][h][..] + own_weight own_value) share, HG heads, V vectors of each.
template <int HG, int V>
FASTDIFF_INLINE void gather_block(const KeyValues& cache, const float* weights, int seen, int head, int d,
                                  const float* own_weights, const float* own_value, const float* shares,
                                  float* gathered) {
  const int wide = padded(cache.width), of_head = cache.key_step();
  const int64_t step = cache.values_of_head();
  Vec sums[HG][V];
  for (int h = 0; h < HG; h++) {
    for (int v = 0; v < V; v++) sums[h][v] = zero();
  }
  const float* at = cache.values + head * step + d;
  for (int p = 0; p < seen; p++, at += wide) {
    for (int h = 0; h < HG; h++) {
      const Vec by = set1(weights[(head + h) * of_head + p]);
      for (int v = 0; v < V; v++) sums[h][v] = fma(by, load(at + h * step + v * kLanes), sums[h][v]);
    }
  }
  for (int h = 0; h < HG; h++) {
    for (int v = 0; v < V; v++) {
      const int from = d + v * kLanes, rest = cache.width - from, n = rest < kLanes ? rest : kLanes;
      const int64_t place = static_cast<int64_t>(head + h) * cache.width + from;
      Vec sum = sums[h][v];
      if (own_value != nullptr) sum = fma(set1(own_weights[head + h]), load_n(own_value + place, n), sum);
      store_n(gathered + place, sum * set1(shares[head + h]), n);
    }
  }
}

// gathered [heads * width] = softmax(query . key + bias) values over the first `seen` keys and, where own_key is given,
// over one more key after them, whose bias is 0; one key at least.
//
// query      [heads * width], holding its scale; with `even` all scores count as 0, so that the bias alone weighs
// bias       [padded(seen)] added to the scores, -inf for a key that is not there
// own_key    [heads * width] or null        own_value  likewise
// room       attend_floats(heads, n_keys)
inline void attend(const KeyValues& cache, const float* query, bool even, const float* bias, int seen,
                   const float* own_key, const float* own_value, float* gathered, float* room) {
  const int heads = cache.heads, width = cache.width, step = cache.key_step(), whole = padded(seen);
  float* const scores = room;
  float* const own = scores + static_cast<int64_t>(heads) * step;  // the own key's scores, then its weights
  float* const tops = own + padded(heads);
  float* const totals = tops + padded(heads);
  float* const shares = totals + padded(heads);
  int at = 0;
  if (even) {
    for (; at < whole; at += kLanes) {
      for (int head = 0; head < heads; head++) store(scores + head * step + at, load(bias + at));
    }
  }
  const int needed = (seen + kLanes - 1) / kLanes * kLanes;
  for (; at + 4 * kLanes <= needed; at += 4 * kLanes) score_vectors<4>(cache, query, at, bias, scores);
  if (at + 3 * kLanes == needed) score_vectors<3>(cache, query, at, bias, scores), at += 3 * kLanes;
  for (; at + 2 * kLanes <= needed; at += 2 * kLanes) score_vectors<2>(cache, query, at, bias, scores);
  for (; at < needed; at += kLanes) score_vectors<1>(cache, query, at, bias, scores);

  for (int head = 0; head < heads; head++) {
    const int64_t place = static_cast<int64_t>(head) * width;
    Vec product = zero();
    for (int d = 0; own_key != nullptr && d < width; d += kLanes) {
      const int n = width - d < kLanes ? width - d : kLanes;
      product = fma(load_n(query + place + d, n), load_n(own_key + place + d, n), product);
    }
    own[head] = own_key == nullptr ? -__builtin_inff() : even ? 0.0f : sum(product);
  }
  const int last = seen / kLanes * kLanes;
  const Mask seen_of_last = first_n(seen - last);
  for (int head = 0; head < heads; head++) {
    float* of_head = scores + static_cast<int64_t>(head) * step;
    Vec high = set1(own[head]);
    for (int p = 0; p < last; p += kLanes) high = max(high, load(of_head + p));
    if (last < needed) {
      const Vec masked = select(seen_of_last, load(of_head + last), set1(-__builtin_inff()));
      store(of_head + last, masked);
      high = max(high, masked);
    }
    tops[head] = largest(high);
  }
  for (int head = 0; head < heads; head++) {
    float* of_head = scores + static_cast<int64_t>(head) * step;
    const Vec top = set1(tops[head]);
    Vec total = zero();
    for (int p = 0; p < needed; p += kLanes) {
      const Vec weight = weight_of(load(of_head + p) - top);
      store(of_head + p, weight);
      total = total + weight;
    }
    totals[head] = sum(total);
  }
  for (int h = heads; h < padded(heads); h++) own[h] = tops[h] = totals[h] = 0.0f;
  for (int h = 0; h < heads; h += kLanes) {
    const Vec own_weight = weight_of(load(own + h) - load(tops + h));
    store(own + h, own_weight);
    store(shares + h, set1(1.0f) / (load(totals + h) + own_weight));
  }

  const int vectors = (width + kLanes - 1) / kLanes;
  int head = 0;
  if (vectors == 1) {
    for (; head + 4 <= heads; head += 4) {
      gather_block<4, 1>(cache, scores, seen, head, 0, own, own_value, shares, gathered);
    }
  } else if (vectors == 2) {
    for (; head + 4 <= heads; head += 4) {
      gather_block<4, 2>(cache, scores, seen, head, 0, own, own_value, shares, gathered);
    }
  } else if (vectors == 4) {
    for (; head + 2 <= heads; head += 2) {
      gather_block<2, 4>(cache, scores, seen, head, 0, own, own_value, shares, gathered);
    }
  }
  for (; head < heads; head++) {
    int d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
      gather_block<1, 4>(cache, scores, seen, head, d, own, own_value, shares, gathered);
    }
    for (; d < width; d += kLanes) {
      gather_block<1, 1>(cache, scores, seen, head, d, own, own_value, shares, gathered);
    }
  }
}

// y[r][..] = start + sum_k x[r][k] w[k][..] for R rows and V vectors; rows of w are w_step apart. start may be null for 0.
template <int R, int V>
FASTDIFF_INLINE void product_block(const float* x, int64_t x_step, int n, const float* w, int64_t w_step,
                                   const float* start, float* y, int64_t y_step) {
  Vec sums[R][V];
  for (int v = 0; v < V; v++) {
    const Vec from = start == nullptr ? zero() : load(start + v * kLanes);
    for (int r = 0; r < R; r++) sums[r][v] = from;
  }
  for (int k = 0; k < n; k++, w += w_step) {
    Vec of_k[V];
    for (int v = 0; v < V; v++) of_k[v] = load(w + v * kLanes);
    for (int r = 0; r < R; r++) {
      const Vec by = set1(x[r * x_step + k]);
      for (int v = 0; v < V; v++) sums[r][v] = fma(by, of_k[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) store(y + r * y_step + v * kLanes, sums[r][v]);
  }
}

template <int R>
FASTDIFF_INLINE void product_rows(const float* x, int64_t x_step, int n, const float* w, int64_t w_step,
                                  const float* start, float* y, int64_t y_step, int width) {
  int at = 0;
  const auto next = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    product_block<R, V>(x, x_step, n, w + at, w_step, start == nullptr ? nullptr : start + at, y + at, y_step);
    at += V * kLanes;
  };
  while (at + kBlockVecs * kLanes <= width) next(Count<kBlockVecs>{});
  while (at + 2 * kLanes <= width) next(Count<2>{});
  while (at < width) next(Count<1>{});
}

// `attend` for R queries of one history, query r over the first first_seen + r keys and no own one: the same bits. All
// are computed for as many keys as the last one sees, and weigh 0 where they do not see.
template <int R>
inline void attend_block(const KeyValues& cache, const float* queries, int64_t query_step, const float* bias,
                         int first_seen, float* gathered, int64_t gathered_step, float* scores) {
  const int width = cache.width, wide = padded(width), step = cache.key_step(), most = first_seen + R - 1;
  const int needed = (most + kLanes - 1) / kLanes * kLanes;
  for (int head = 0; head < cache.heads; head++) {
    product_rows<R>(queries + head * width, query_step, width, cache.keys + int64_t{1} * head * width * step, step, bias,
                    scores, step, needed);
    float shares[R];
    for (int r = 0; r < R; r++) {
      float* const of_row = scores + r * step;
      const int seen = first_seen + r;
      Vec high = set1(-__builtin_inff());
      for (int p = seen / kLanes * kLanes; p < needed; p += kLanes) {
        store(of_row + p, select(first_n(seen - p), load(of_row + p), set1(-__builtin_inff())));
      }
      for (int p = 0; p < needed; p += kLanes) high = max(high, load(of_row + p));
      const Vec top = set1(largest(high));
      Vec total = zero();
      for (int p = 0; p < needed; p += kLanes) {
        const Vec weight = weight_of(load(of_row + p) - top);
        store(of_row + p, weight);
        total = total + weight;
      }
      shares[r] = 1.0f / sum(total);
    }
    alignas(64) float sums[R * 4 * kPanel];
    const float* values = cache.values + head * cache.values_of_head();
    for (int from = 0; from < width; from += 4 * kPanel) {
      const int n = wide - from < 4 * kPanel ? wide - from : 4 * kPanel;
      product_rows<R>(scores, step, most, values + from, wide, nullptr, sums, 4 * kPanel, n);
      for (int r = 0; r < R; r++) {
        float* const to = gathered + r * gathered_step + head * width + from;
        for (int at = 0; at < n && from + at < width; at += kLanes) {
          store_n(to + at, load(sums + r * 4 * kPanel + at) * set1(shares[r]), lanes_left(width - from, at));
        }
      }
    }
  }
}

// attend_block for any number of rows; room holds attend_causal_floats(n_keys).
inline void attend_causal(const KeyValues& cache, const float* queries, int64_t query_step, int rows, const float* bias,
                        int first_seen, float* gathered, int64_t gathered_step, float* room) {
  for (int blocks = (rows + kMostRows - 1) / kMostRows; blocks > 0; blocks--) {
    const int n = (rows + blocks - 1) / blocks;
    const auto attend_n = [&](auto count) {
      attend_block<decltype(count)::value>(cache, queries, query_step, bias, first_seen, gathered, gathered_step, room);
    };
    with_count(n, attend_n);
    queries += n * query_step, gathered += n * gathered_step, first_seen += n, rows -= n;
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
