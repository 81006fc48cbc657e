// The pieces of a post-norm transformer block on a few rows of floats, each row on its own: a row's bits depend on that
// row alone. Attention is in attention.h.
//
//     h = LN_1(x + W_o attended + b_o)        out = LN_2(h + W_down act(W_up h + b_up) + b_down)
#pragma once

#include "linear.h"
#include "transformer_block.h"
#include "vecmath.h"

namespace fastdiff {

constexpr int kMostRows = 6;  // of one register block, at every level

namespace FASTDIFF_LEVEL {

// The lanes below n of a vector: those of a row's last, partial vector.
FASTDIFF_INLINE Mask first_n(int n) {
  alignas(64) static const float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return greater(set1(static_cast<float>(n)), load(lane));
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// run(Count<n>{}) for n in 1 .. kMostRows.
template <class Run>
FASTDIFF_INLINE void with_count(int n, const Run& run) {
  switch (n) {
    case 6: return run(Count<6>{});
    case 5: return run(Count<5>{});
    case 4: return run(Count<4>{});
    case 3: return run(Count<3>{});
    case 2: return run(Count<2>{});
    default: return run(Count<1>{});
  }
}

// V vectors of outputs for any number of rows, as evenly spread over register blocks as can be: 7 rows are 4 and 3, not 6
// and 1.
template <int V>
FASTDIFF_INLINE void linear_strip(const Linear& layer, const float* x, int64_t x_step, int rows, float* y,
                                  int64_t y_step, int first) {
  for (int blocks = (rows + kMostRows - 1) / kMostRows; blocks > 0; blocks--) {
    const int n = (rows + blocks - 1) / blocks;
    with_count(n, [&](auto count) {
      linear_block<decltype(count)::value, V>(layer, x, x_step, y, y_step, first, false);
    });
    x += n * x_step, y += n * y_step, rows -= n;
  }
}

// `linear` for any number of rows. All rows pass over a few panels before the next ones are read: weights that do not fit
// the second cache come from afar once, whatever the number of rows.
inline void linear_spread(const Linear& layer, const float* x, int64_t x_step, int rows, float* y, int64_t y_step,
                          int first_panel = 0, int last_panel = -1) {
  int first = first_panel * kVecsPerPanel;
  const int last = (last_panel < 0 ? padded(layer.n_out) / kPanel : last_panel) * kVecsPerPanel;
  if (rows == 1) return linear_rows<1>(layer, x, x_step, y, y_step, first, last, false);
  for (; first + kBlockVecs <= last; first += kBlockVecs) {
    linear_strip<kBlockVecs>(layer, x, x_step, rows, y, y_step, first);
  }
  if (first + 2 <= last) linear_strip<2>(layer, x, x_step, rows, y, y_step, first), first += 2;
  if (first < last) linear_strip<1>(layer, x, x_step, rows, y, y_step, first);
}

// y = LN(x + residual) = (s - mean s) / sqrt(var s + eps) * weight + bias over the dim numbers of each row; var is
// biased. residual may be null; y may be x or residual. weight and bias are padded as packed layers are.
inline void layer_norm_rows(const float* x, int64_t x_step, const float* residual, int64_t residual_step, int rows,
                            int dim, const float* weight, const float* bias, float eps, float* y, int64_t y_step) {
  const int whole = dim / kLanes * kLanes, rest = dim - whole;
  const float share = 1.0f / static_cast<float>(dim);
  for (int row = 0; row < rows; row++) {
    const float* from = x + row * x_step;
    const float* beside = residual == nullptr ? nullptr : residual + row * residual_step;
    float* to = y + row * y_step;
    Vec total = zero();
    for (int at = 0; at < whole; at += kLanes) {
      const Vec s = beside == nullptr ? load(from + at) : load(from + at) + load(beside + at);
      store(to + at, s);
      total = total + s;
    }
    if (rest > 0) {
      Vec s = load_n(from + whole, rest);
      if (beside != nullptr) s = s + load_n(beside + whole, rest);
      store_n(to + whole, s, rest);
      total = total + s;
    }
    const Vec mean = set1(sum(total) * share);
    Vec squares = zero();
    for (int at = 0; at < whole; at += kLanes) {
      const Vec off = load(to + at) - mean;
      squares = fma(off, off, squares);
    }
    if (rest > 0) {
      const Vec off = select(first_n(rest), load_n(to + whole, rest) - mean, zero());
      squares = fma(off, off, squares);
    }
    const Vec by = set1(1.0f / __builtin_sqrtf(sum(squares) * share + eps));
    for (int at = 0; at < whole; at += kLanes) {
      store(to + at, fma((load(to + at) - mean) * by, load(weight + at), load(bias + at)));
    }
    if (rest > 0) {
      const Vec off = load_n(to + whole, rest) - mean;
      store_n(to + whole, fma(off * by, load_n(weight + whole, rest), load_n(bias + whole, rest)), rest);
    }
  }
}

// x = gelu_tanh(x) over whole vectors: `width` is a multiple of a panel.
inline void gelu_tanh_rows(float* x, int64_t step, int rows, int width) {
  for (int row = 0; row < rows; row++) {
    for (int at = 0; at < width; at += kLanes) store(x + row * step + at, gelu_tanh(load(x + row * step + at)));
  }
}

// Who does all of the work. Members of a team (team.h) each do a part of every layer's outputs, and meet in between.
struct Alone {
  static constexpr int member = 0, count = 1;
  bool meet() const { return true; }
};

// Where a part of n things begins; it ends where the next one begins.
template <class Part>
FASTDIFF_INLINE int part_begin(const Part& part, int n) {
  return n * part.member / part.count;
}
template <class Part>
FASTDIFF_INLINE int part_end(const Part& part, int n) {
  return n * (part.member + 1) / part.count;
}

template <class Part>
FASTDIFF_INLINE void linear_part(const Part& part, const Linear& layer, const float* x, int64_t x_step, int rows,
                                 float* y, int64_t y_step) {
  const int panels = padded(layer.n_out) / kPanel;
  linear_spread(layer, x, x_step, rows, y, y_step, part_begin(part, panels), part_end(part, panels));
}

// The block after its attention, in place: h [rows, step()] becomes its output. attended [rows, step()] is what the
// heads gathered; room holds finish_floats(shape, rows). Members of a team share attended and room, and have h each for
// itself; false where a member is to stop (Team::meet).
template <class Part>
inline bool finish_block(const Block& block, float* h, const float* attended, int rows, float* room, Part part) {
  const int dim = block.shape.dim, step = block.shape.step(), hidden = block.shape.hidden_step();
  float* const y = room;
  float* const up = room + static_cast<int64_t>(rows) * step;
  linear_part(part, block.out, attended, step, rows, y, step);
  if (!part.meet()) return false;
  layer_norm_rows(y, step, h, step, rows, dim, block.norm_1_weight, block.norm_1_bias, block.shape.eps, h, step);
  linear_part(part, block.up, h, step, rows, up, hidden);
  const int first = part_begin(part, hidden / kPanel) * kPanel, last = part_end(part, hidden / kPanel) * kPanel;
  gelu_tanh_rows(up + first, hidden, rows, last - first);
  if (!part.meet()) return false;
  linear_part(part, block.down, up, hidden, rows, y, step);
  if (!part.meet()) return false;
  layer_norm_rows(y, step, h, step, rows, dim, block.norm_2_weight, block.norm_2_bias, block.shape.eps, h, step);
  return true;
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
