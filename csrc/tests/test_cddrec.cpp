// encode_padded_history and decode_context against plain loops in double, over odd sizes, at every level.
#include <algorithm>

#include "../cpu/decode_context.h"
#include "../cpu/encode_padded_history.h"
#include "layers.h"

namespace fastdiff {
namespace tests {
namespace {

Row operator+(Row a, const Row& b) {
  for (size_t i = 0; i < a.size(); i++) a[i] += b[i];
  return a;
}

Row activate(Row x, bool gelu) {
  for (double& v : x) v = gelu ? 0.5 * v * std::erfc(-v / std::sqrt(2.0)) : std::fmax(v, 0.0);
  return x;
}

// what one query gathers from the keys that it may see
Row attend(const Row& query, const Rows& keys, const Rows& values, int heads) {
  const size_t width = query.size() / heads;
  Row gathered(query.size(), 0.0);
  for (int head = 0; head < heads; head++) {
    Row scores;
    for (const Row& key : keys) {
      double score = 0;
      for (size_t d = head * width; d < (head + 1) * width; d++) score += query[d] * key[d];
      scores.push_back(score / std::sqrt(static_cast<double>(width)));
    }
    const double top = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - top);
    for (size_t k = 0; k < keys.size(); k++) {
      for (size_t d = head * width; d < (head + 1) * width; d++) gathered[d] += scores[k] / total * values[k][d];
    }
  }
  return gathered;
}

void pack_joined(Floats& to, const Dense& query, const Dense& key, const Dense& value, double factor) {
  Floats weight, bias;
  for (const Dense* layer : {&query, &key, &value}) {
    const double by = layer == &query ? factor : 1.0;
    for (const float w : layer->weight) weight.push_back(static_cast<float>(by * w));
    for (const float b : layer->bias) bias.push_back(static_cast<float>(by * b));
  }
  pack(to, weight, query.n_in, 3 * query.n_in);
  pack(to, bias);
}

// A room of exactly so many floats, aligned as the callers' is; the end is the allocation's end.
class Room {
 public:
  explicit Room(int64_t floats) : memory_(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {
    for (int64_t i = 0; i < floats; i++) memory_[i] = kNaN;
  }
  ~Room() { std::free(memory_); }
  float* get() { return memory_; }

 private:
  float* memory_;
};

// --- the encoder -----------------------------------------------------------------------------------------------------

struct EncoderLayer {
  Dense query, key, value, out, up, down;
  Norm norm_1, norm_2;

  EncoderLayer(Draws& draws, int dim, int hidden)
      : query(draws, dim, dim),
        key(draws, dim, dim),
        value(draws, dim, dim),
        out(draws, dim, dim),
        up(draws, dim, hidden),
        down(draws, hidden, dim),
        norm_1(draws, dim),
        norm_2(draws, dim) {}

  Row finish(const Row& x, const Row& gathered, bool gelu, double eps) const {
    const Row h = norm_1(out(gathered) + x, eps);
    return norm_2(down(activate(up(h), gelu)) + h, eps);
  }
};

void encode(int dim, int heads, int hidden, int layers, int window, bool gelu, int64_t users) {
  constexpr double kEps = 1e-12;
  constexpr int kRows = 11;
  Draws draws(static_cast<uint64_t>(dim * 1000 + window));
  std::vector<EncoderLayer> blocks;
  for (int i = 0; i < layers; i++) blocks.emplace_back(draws, dim, hidden);
  const Norm norm(draws, dim);
  const Floats table = draws.normals(kRows * dim), positions = draws.normals(int64_t{1} * window * dim);
  const Floats empty = draws.normals(dim);
  std::vector<int64_t> items, lengths;
  for (int64_t user = 0; user < users; user++) {
    lengths.push_back(user % (window + 1));
    for (int i = 0; i < window; i++) {
      items.push_back(i < lengths.back() ? (user % 5 == 4 ? 0 : draws.below(kRows)) : int64_t{1} << 40);  // 0: the pad
    }
  }

  std::vector<double> want;
  for (int64_t user = 0; user < users; user++) {
    Rows x;
    std::vector<bool> is_key;
    for (int64_t i = 0; i < lengths[user]; i++) {
      const int64_t item = items[user * window + i];
      x.push_back(norm(row_of(table, item, dim) + row_of(positions, window - lengths[user] + i, dim), kEps));
      is_key.push_back(item != 0);
    }
    Row context(empty.begin(), empty.end());
    if (std::count(is_key.begin(), is_key.end(), true) > 0) {
      for (const EncoderLayer& block : blocks) {
        Rows keys, values, next;
        for (size_t i = 0; i < x.size(); i++) {
          if (is_key[i]) keys.push_back(block.key(x[i])), values.push_back(block.value(x[i]));
          next.push_back(keys.empty() ? x[i]
                                      : block.finish(x[i], attend(block.query(x[i]), keys, values, heads), gelu, kEps));
        }
        x = next;
      }
      context = x.back();
    }
    want.insert(want.end(), context.begin(), context.end());
  }

  std::vector<Floats> packed(blocks.size());
  std::vector<const float*> pointers;
  const int width = dim / heads;
  const double factor = 1.0 / std::sqrt(static_cast<double>(width));
  for (size_t i = 0; i < blocks.size(); i++) {
    const EncoderLayer& block = blocks[i];
    Floats& to = packed[i];
    if (i + 1 < blocks.size()) {
      pack_joined(to, block.query, block.key, block.value, factor);
    } else {
      pack(to, block.query, factor);
      for (int head = 0; head < heads; head++) {
        Floats turned;
        for (int o = 0; o < dim; o++) {
          for (int d = 0; d < width; d++) turned.push_back(block.key.weight[(head * width + d) * dim + o]);
        }
        pack(to, turned, width, dim);
      }
      for (int head = 0; head < heads; head++) {
        const auto rows = block.value.weight.begin() + head * width * dim;
        pack(to, Floats(rows, rows + width * dim), dim, width);
        pack(to, Floats(block.value.bias.begin() + head * width,
                                    block.value.bias.begin() + (head + 1) * width));
      }
    }
    pack(to, block.out), pack(to, block.norm_1), pack(to, block.up), pack(to, block.down), pack(to, block.norm_2);
  }
  for (const auto& block : packed) pointers.push_back(block.data());
  Floats norm_weight, norm_bias, context(static_cast<size_t>(users * dim), kNaN);
  pack(norm_weight, norm.weight), pack(norm_bias, norm.bias);
  PaddedHistoryArgs args{};
  args.items = items.data(), args.lengths = lengths.data(), args.width = window, args.window = window, args.pad_id = 0;
  args.table = table.data(), args.positions = positions.data();
  args.norm_weight = norm_weight.data(), args.norm_bias = norm_bias.data();
  args.blocks = pointers.data(), args.n_blocks = layers, args.dim = dim, args.hidden = hidden, args.heads = heads;
  args.gelu = gelu, args.eps = kEps, args.empty = empty.data(), args.context = context.data();
  for (int64_t first = 0; first < users;) {
    const int64_t last = std::min(users, first + 1 + draws.below(kPaddedUsers));
    int64_t slots = 0, longest = 1;
    for (int64_t user = first; user < last; user++) slots += lengths[user], longest = std::max(longest, lengths[user]);
    Room room(padded_history_floats(args, slots, static_cast<int>(longest)));
    FASTDIFF_PICK(encode_padded_history)(args, first, last, room.get());
    first = last;
  }
  expect_close(context, want, 2e-4, "encode_padded_history, dim " + std::to_string(dim));
}

// --- the decoder -----------------------------------------------------------------------------------------------------

void decode(int dim, int heads, bool coupled, bool gelu, int64_t users, int64_t samples, bool philox) {
  constexpr double kEps = 1e-5;
  Draws draws(static_cast<uint64_t>(dim * 100 + users));
  const Dense query(draws, dim, dim), key(draws, dim, dim), value(draws, dim, dim), out(draws, dim, dim);
  const Dense linear_1(draws, dim, dim), linear_2(draws, dim, dim);
  const Norm norm_1(draws, dim), norm_2(draws, dim), norm_3(draws, dim);
  const double coef[] = {0.8, philox ? 0.0 : 0.3, 0.0, 0.7, -0.2, philox ? 0.5 : 0.25};
  constexpr int kSteps = 2;
  const int64_t rows = users * samples;
  const Floats context = draws.normals(users * dim), cross = draws.normals(kSteps * dim);
  const Floats x_t = draws.normals(rows * dim), noise = draws.normals(kSteps * rows * dim);

  Rows keys, values;
  for (int64_t user = 0; user < users; user++) {
    keys.push_back(key(row_of(context, user, dim)));
    values.push_back(value(row_of(context, user, dim)));
  }
  std::vector<double> want;
  for (int64_t row = 0; row < rows; row++) {
    const Row c = row_of(context, row / samples, dim);
    const Row gathered = coupled ? attend(query(c), keys, values, heads) : value(c);
    const Row attended = norm_1(c + out(gathered), kEps);
    Row x = row_of(x_t, row, dim);
    for (int i = 0; i < kSteps; i++) {
      const Row memory = norm_2(attended + row_of(cross, i, dim), kEps);
      const Row mean = norm_3(memory + linear_2(activate(linear_1(memory), gelu)), kEps);
      for (int d = 0; d < dim; d++) {
        x[d] = coef[3 * i] * mean[d] + coef[3 * i + 1] * x[d] +
               (philox ? 0.0 : coef[3 * i + 2] * noise[(i * rows + row) * dim + d]);
      }
    }
    want.insert(want.end(), x.begin(), x.end());
  }

  Floats weights;
  const double factor = 1.0 / std::sqrt(static_cast<double>(dim / heads));
  if (coupled) {
    pack_joined(weights, query, key, value, factor);
  } else {
    pack(weights, value);
  }
  pack(weights, out), pack(weights, norm_1), pack(weights, linear_1), pack(weights, linear_2);
  pack(weights, norm_2), pack(weights, norm_3);
  const KeyPanels panels = {nullptr, nullptr, heads, dim / heads, static_cast<int>(users)};
  Floats queries(coupled ? users * padded(3 * dim) : 0, kNaN),
      key_panels(coupled ? panels.key_floats() : 0, kNaN);
  Floats value_panels(coupled ? panels.value_floats() : 0, kNaN), x_0(rows * dim, kNaN);
  std::vector<int64_t> row_key, sample;
  for (int64_t row = 0; row < rows; row++) row_key.push_back(row * 7919 - 3), sample.push_back(row % samples);
  ContextArgs args{};
  args.weights = weights.data(), args.dim = dim, args.heads = heads, args.coupled = coupled, args.gelu = gelu,
  args.eps = kEps;
  args.users = users, args.samples = samples, args.context = context.data();
  args.queries = queries.data(), args.keys = key_panels.data(), args.values = value_panels.data();
  args.cross = cross.data(), args.coef = coef, args.steps = kSteps;
  args.x_t = coef[1] == 0.0 ? nullptr : x_t.data();
  args.noise = philox ? nullptr : noise.data();
  args.row_key = philox ? row_key.data() : nullptr, args.sample = sample.data(), args.seed = 5, args.first_draw = 1;
  const auto run = [&](Floats& to) {
    args.x_0 = to.data();
    if (coupled) {
      FASTDIFF_PICK(clear_context)(args);
      for (int64_t first = 0; first < users; first += kPanel) {
        FASTDIFF_PICK(project_context)(args, first, std::min<int64_t>(users, first + kPanel));
      }
    }
    for (int64_t first = 0; first < users;) {
      const int64_t last = std::min(users, first + 1 + draws.below(kContextUsers));
      Room room(context_floats(args));
      FASTDIFF_PICK(decode_context)(args, first, last, room.get());
      first = last;
    }
  };
  run(x_0);
  if (philox) {  // its numbers are another test's: here, what stays when a second run draws the same is the rest
    Floats again(x_0.size(), kNaN);
    run(again);
    double squares = 0;
    for (size_t i = 0; i < x_0.size(); i++) {
      EXPECT(x_0[i] == again[i], "the same draws again");
      const double draw = (x_0[i] - want[i]) / coef[5];
      EXPECT(std::fabs(draw) < 7.0, "no standard normal: ", draw);
      squares += draw * draw;
    }
    const double n = static_cast<double>(x_0.size());
    EXPECT(std::fabs(squares / n - 1.0) < 6.0 * std::sqrt(2.0 / n), "variance ", squares / n, " of ", n, " draws");
  } else {
    expect_close(x_0, want, 1e-4, "decode_context, dim " + std::to_string(dim) + (coupled ? ", coupled" : ""));
  }
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff::tests;
  at_every_level([] {
    encode(1, 1, 3, 1, 1, false, 3);
    encode(6, 3, 5, 2, 4, true, 20);
    encode(20, 2, 37, 3, 7, false, 33);
    encode(48, 4, 96, 2, 19, true, 41);
    encode(128, 2, 128, 1, 20, true, 25);
    for (const bool coupled : {false, true}) {
      for (const bool philox : {false, true}) {
        decode(1, 1, coupled, false, 5, 1, philox);
        decode(6, 3, coupled, true, 1, 3, philox);
        decode(20, 2, coupled, false, 33, 2, philox);
        decode(64, 2, coupled, true, 40, 1, philox);
      }
    }
  });
  return 0;
}
