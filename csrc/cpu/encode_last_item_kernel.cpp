// levels: baseline avx2 avx512
#include "encode_last_item.h"

#include "linear.h"
#include "rows.h"
#include "vecmath.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

struct Norm {
  const float *weight, *bias;
};

struct Block {
  Linear qk, v, up, down, head;
  Norm first, second, feed_forward, third;
  const float* positions;
};

Block unpack(const float* at, int dim, int outputs) {
  const auto layer = [&](int n_out) {
    const int64_t panels = static_cast<int64_t>(padded(n_out)) * dim;
    const Linear here = {at, at + panels, dim, n_out};
    at += panels + padded(n_out);
    return here;
  };
  const auto norm = [&] {
    const Norm here = {at, at + padded(dim)};
    at += 2 * padded(dim);
    return here;
  };
  Block block;
  block.qk = layer(dim);
  block.v = layer(dim);
  block.up = layer(dim);
  block.down = layer(dim);
  block.head = layer(outputs);
  block.first = norm();
  block.second = norm();
  block.feed_forward = norm();
  block.third = norm();
  block.positions = at;
  return block;
}

// Whether the numbers of a row sum to exactly 0: a float sum that its rounding errors cannot have made is trusted, any
// other is done again in double.
bool sums_to_zero(const float* x, int dim, float total, float magnitudes) {
  if (__builtin_fabsf(total) > 1e-6f * static_cast<float>(dim) * magnitudes) return false;
  double exact = 0.0;
  for (int i = 0; i < dim; i++) exact += static_cast<double>(x[i]);
  return exact == 0.0;
}

bool row_sums_to_zero(const float* x, int dim) {
  Vec total = zero(), magnitudes = zero();
  for (int at = 0; at < dim; at += kLanes) {
    const Vec part = load_n(x + at, lanes_left(dim, at));
    total = total + part;
    magnitudes = magnitudes + magnitude(part);
  }
  return sums_to_zero(x, dim, sum(total), sum(magnitudes));
}

// e = E[item] + P_place, with zeros in the padding
FASTDIFF_INLINE void place_item(const EncodeLastItemArgs& args, const Block& block, int64_t item, int64_t place, float* e) {
  const float* const from = args.table + item * args.dim;
  const float* const position = block.positions + place * padded(args.dim);
  for (int at = 0; at < args.dim; at += kLanes) {
    store(e + at, load_n(from + at, lanes_left(args.dim, at)) + load(position + at));  // positions are padded with 0
  }
}

// softmax in place over the places that are allowed; the others hold minus infinity. False where there are none.
FASTDIFF_INLINE bool softmax(float* logits, int64_t n) {
  const int64_t end = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t at = n; at < end; at++) logits[at] = -__builtin_inff();
  Vec highest = load(logits);
  for (int64_t at = kLanes; at < end; at += kLanes) highest = max(highest, load(logits + at));
  alignas(64) float lanes[kLanes];
  store(lanes, highest);
  float most = lanes[0];
  for (int i = 1; i < kLanes; i++) most = lanes[i] > most ? lanes[i] : most;
  if (most == -__builtin_inff()) return false;
  Vec total = zero();
  for (int64_t at = 0; at < end; at += kLanes) {
    const Vec weight = exp(load(logits + at) - set1(most));
    store(logits + at, weight);
    total = total + weight;
  }
  const Vec by = set1(sum(total));
  for (int64_t at = 0; at < end; at += kLanes) store(logits + at, load(logits + at) / by);
  return true;
}

// mixed = sum_j softmax_j(query . e_j) e_j over the places 0 .. last of one user
void attend(const EncodeLastItemArgs& args, const Block& block, const int64_t* items, int64_t length, const float* query,
            float* e, float* logits, float* mixed) {
  const int dim = args.dim;
  for (int64_t place = 0; place < length; place++) {
    logits[place] = -__builtin_inff();
    if (items[place] == args.pad_id) continue;
    place_item(args, block, items[place], place, e);
    Vec dot = zero(), total = zero(), magnitudes = zero();
    for (int at = 0; at < dim; at += kLanes) {
      const Vec part = load(e + at);
      dot = fma(load(query + at), part, dot);
      total = total + part;
      magnitudes = magnitudes + magnitude(part);
    }
    if (!sums_to_zero(e, dim, sum(total), sum(magnitudes))) logits[place] = sum(dot);
  }
  const bool any = length > 0 && softmax(logits, length);
  for (int at = 0; at < padded(dim); at += kLanes) store(mixed + at, zero());
  for (int64_t place = 0; place < length; place++) {
    if (items[place] == args.pad_id || (any && logits[place] == 0.0f)) continue;
    // with no key left, each place of the window weighs the same
    const Vec weight = set1(any ? logits[place] : 1.0f / static_cast<float>(args.window));
    place_item(args, block, items[place], place, e);
    for (int at = 0; at < dim; at += kLanes) store(mixed + at, fma(weight, load(e + at), load(mixed + at)));
  }
}

}  // namespace

bool encode_last_item(const EncodeLastItemArgs& args) {
  const Block block = unpack(args.weights, args.dim, args.outputs);
  const int dim = args.dim, whole = padded(dim), rows = args.rows;
  float* const query = args.scratch;
  float* const a = query + rows * whole;
  float* const b = a + rows * whole;
  float* const z = b + rows * whole;
  float* const e = z + rows * whole;
  float* const logits = e + whole;
  float* const heads = logits + (args.places + 31) / kPanel * kPanel;

  const auto has_item = [&](int row) {  // whether the last place holds one
    const int64_t length = args.lengths[row];
    return length > 0 && args.items[row * args.places + length - 1] != args.pad_id;
  };
  for (int row = 0; row < rows; row++) {
    const int64_t length = args.lengths[row];
    const int64_t* const items = args.items + row * args.places;
    if (length < 0 || length > args.places || length > args.window) return false;
    for (int64_t place = 0; place < length; place++) {
      if (items[place] < 0 || items[place] >= args.table_rows) return false;
    }
    for (int at = 0; at < whole; at += kLanes) store(e + at, zero());
    if (has_item(row)) place_item(args, block, items[length - 1], length - 1, e);
    layer_norm(e, dim, block.first.weight, block.first.bias, args.eps, query + row * whole);
  }
  linear(block.qk, query, whole, rows, a, whole);
  for (int row = 0; row < rows; row++) {
    attend(args, block, args.items + row * args.places, args.lengths[row], a + row * whole, e, logits, b + row * whole);
  }
  linear(block.v, b, whole, rows, a, whole);
  for (int row = 0; row < rows; row++) {
    float* const y = query + row * whole;
    if (!row_sums_to_zero(y, dim)) {
      for (int at = 0; at < dim; at += kLanes) store(y + at, load(y + at) + load(a + row * whole + at));
    }
    layer_norm(y, dim, block.second.weight, block.second.bias, args.eps, z + row * whole);
  }
  linear(block.up, z, whole, rows, a, whole);
  for (int at = 0; at < rows * whole; at += kLanes) store(a + at, relu(load(a + at)));
  linear(block.down, a, whole, rows, b, whole);
  for (int row = 0; row < rows; row++) {
    float* const out = b + row * whole;
    for (int at = 0; at < dim; at += kLanes) store(out + at, load(out + at) + load(z + row * whole + at));
    layer_norm(out, dim, block.feed_forward.weight, block.feed_forward.bias, args.eps, out);
    if (!has_item(row)) {
      for (int at = 0; at < whole; at += kLanes) store(out + at, zero());
    }
    layer_norm(out, dim, block.third.weight, block.third.bias, args.eps, out);
    if (args.outputs == 0) unpad_row(out, args.h + static_cast<int64_t>(row) * dim, dim);
  }
  if (args.outputs > 0) {
    const int n_out = args.outputs;
    linear(block.head, b, whole, rows, heads, padded(n_out));
    for (int row = 0; row < rows; row++) {
      unpad_row(heads + row * padded(n_out), args.h + static_cast<int64_t>(row) * n_out, n_out);
    }
  }
  return true;
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
