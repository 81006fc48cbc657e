// levels: baseline avx2 avx512
#include "encode_interests.h"

#include "linear.h"
#include "rows.h"
#include "vecmath.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

bool fits(const EncodeInterestsArgs& args, int row) {
  const int64_t length = args.lengths[row];
  if (length < 0 || length > args.places || (args.weights != nullptr && length > args.window)) return false;
  const int64_t* const items = args.items + row * args.places;
  for (int64_t place = 0; place < length; place++) {
    if (items[place] < 0 || items[place] >= args.table_rows) return false;
  }
  return true;
}

// The last items, oldest first; zeros where there is none.
void last_items(const EncodeInterestsArgs& args, int row) {
  for (int k = 0; k < args.interests; k++) {
    const int64_t place = args.lengths[row] - args.interests + k;
    const int64_t item = place < 0 ? args.pad_id : args.items[row * args.places + place];
    const float* const from = args.table + item * args.dim;
    float* const to = args.g + (static_cast<int64_t>(row) * args.interests + k) * args.dim;
    for (int i = 0; i < args.dim; i++) to[i] = item == args.pad_id ? 0.0f : from[i];
  }
}

constexpr int kTogether = 4;  // rows whose chains of fma hide one another's latency
constexpr int kPart = 16;

// logits [rows, columns] = hidden [rows, n_in] W^T + b, as `linear` computes it but for the order of the sum: parts of 16
// terms, added up with their rounding errors kept (Kahan). A trained model's logits are tens in size while softmax looks
// at their differences, so that each ulp of a sum of hundreds of terms would be seen in the interests.
template <int R>
void logit_rows(const Linear& layer, const float* hidden, int64_t step, float* logits, int64_t columns) {
  for (int v = 0; v < columns / kLanes; v++) {
    const float* const weight = weight_vec(layer, v);
    Vec total[R], lost[R];
    for (int r = 0; r < R; r++) total[r] = load(layer.bias + v * kLanes), lost[r] = zero();
    for (int start = 0; start < layer.n_in; start += kPart) {
      Vec part[R];
      for (int r = 0; r < R; r++) part[r] = zero();
      const int end = start + kPart < layer.n_in ? start + kPart : layer.n_in;
      for (int k = start; k < end; k++) {
        const Vec w = load(weight + static_cast<int64_t>(k) * kPanel);
        for (int r = 0; r < R; r++) part[r] = fma(set1(hidden[r * step + k]), w, part[r]);
      }
      for (int r = 0; r < R; r++) {
        const Vec whole = part[r] - lost[r], sum = total[r] + whole;
        lost[r] = (sum - total[r]) - whole;
        total[r] = sum;
      }
    }
    for (int r = 0; r < R; r++) store(logits + r * columns + v * kLanes, total[r]);
  }
}

void logits_of(const Linear& layer, const float* hidden, int64_t step, int rows, float* logits, int64_t columns) {
  int row = 0;
  for (; row + kTogether <= rows; row += kTogether) {
    logit_rows<kTogether>(layer, hidden + row * step, step, logits + row * columns, columns);
  }
  for (; row < rows; row++) logit_rows<1>(layer, hidden + row * step, step, logits + row * columns, columns);
}

// softmax over n rows of logits, each interest (a column) by itself
void softmax_columns(float* logits, int64_t n, int64_t width) {
  for (int64_t at = 0; at < width; at += kLanes) {
    float* const column = logits + at;
    Vec most = load(column);
    for (int64_t j = 1; j < n; j++) most = max(most, load(column + j * width));
    Vec total = zero();
    for (int64_t j = 0; j < n; j++) {
      const Vec weight = exp(load(column + j * width) - most);
      store(column + j * width, weight);
      total = total + weight;
    }
    for (int64_t j = 0; j < n; j++) store(column + j * width, load(column + j * width) / total);
  }
}

}  // namespace

bool encode_interests(const EncodeInterestsArgs& args) {
  for (int row = 0; row < args.rows; row++) {
    if (!fits(args, row)) return false;
  }
  if (args.weights == nullptr) {
    for (int row = 0; row < args.rows; row++) last_items(args, row);
    return true;
  }
  const int dim = args.dim, whole = padded(dim), wide = padded(args.hidden), columns = padded(args.interests);
  const float* at = args.weights;
  const Linear first = {at, at + static_cast<int64_t>(wide) * dim, dim, args.hidden};
  at += static_cast<int64_t>(wide) * (dim + 1);
  const Linear second = {at, at + static_cast<int64_t>(columns) * args.hidden, args.hidden, args.interests};
  const float* const positions = at + static_cast<int64_t>(columns) * (args.hidden + 1);
  float* const placed = args.scratch;
  float* const hidden = placed + kInterestPlaces * whole;
  float* const sums = hidden + kInterestPlaces * wide;
  float* const logits = sums + args.interests * whole;

  // the logits of all places that hold an item, users after one another
  int64_t done = 0;
  int waiting = 0;
  const auto through_the_layers = [&] {
    linear(first, placed, whole, waiting, hidden, wide);
    for (int i = 0; i < waiting * wide; i += kLanes) store(hidden + i, tanh(load(hidden + i)));
    logits_of(second, hidden, wide, waiting, logits + done * columns, columns);
    done += waiting;
    waiting = 0;
  };
  for (int row = 0; row < args.rows; row++) {
    for (int64_t place = 0; place < args.lengths[row]; place++) {
      const int64_t item = args.items[row * args.places + place];
      if (item == args.pad_id) continue;
      const float *from = args.table + item * dim, *position = positions + place * whole;
      float* const to = placed + waiting * whole;
      for (int i = 0; i < dim; i += kLanes) store(to + i, load_n(from + i, lanes_left(dim, i)) + load(position + i));
      if (++waiting == kInterestPlaces) through_the_layers();
    }
  }
  if (waiting > 0) through_the_layers();

  float* weights = logits;
  for (int row = 0; row < args.rows; row++) {
    const int64_t* const items = args.items + row * args.places;
    int64_t n = 0;
    for (int64_t place = 0; place < args.lengths[row]; place++) n += items[place] != args.pad_id;
    if (n > 0) softmax_columns(weights, n, columns);
    for (int i = 0; i < args.interests * whole; i += kLanes) store(sums + i, zero());
    for (int64_t place = 0; place < args.lengths[row]; place++) {
      if (items[place] == args.pad_id) continue;
      const float *from = args.table + items[place] * dim, *position = positions + place * whole;
      for (int i = 0; i < dim; i += kLanes) {
        Vec value = load_n(from + i, lanes_left(dim, i));
        if (args.positions_in_values) value = value + load(position + i);
        for (int k = 0; k < args.interests; k++) {
          float* const sum = sums + k * whole + i;
          store(sum, fma(set1(weights[k]), value, load(sum)));
        }
      }
      weights += columns;
    }
    for (int k = 0; k < args.interests; k++) {
      unpad_row(sums + k * whole, args.g + (static_cast<int64_t>(row) * args.interests + k) * dim, dim);
    }
  }
  return true;
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
