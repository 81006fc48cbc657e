// levels: baseline avx2 avx512
#include "batch_attention.h"
#include "encode_padded_history.h"
#include "packed_layers.h"
#include "room.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

struct Rest {
  Linear out;
  Norm norm_1;
  Linear up, down;
  Norm norm_2;
};

FASTDIFF_INLINE Rest rest_of(Layers& layers, int dim, int hidden) {
  Rest rest;
  rest.out = layers.layer(dim, dim);
  rest.norm_1 = layers.norm(dim);
  rest.up = layers.layer(dim, hidden);
  rest.down = layers.layer(hidden, dim);
  rest.norm_2 = layers.norm(dim);
  return rest;
}

// The rows that something reads: a user's keys in order, then the newest slot where that is no key.
struct Users {
  int first_row[kPaddedUsers + 1];
  int n_keys[kPaddedUsers];  // 0: no rows at all
};

class Encoder {
 public:
  Encoder(const PaddedHistoryArgs& args, int64_t first_user, int64_t last_user, float* room)
      : args_(args),
        first_user_(first_user),
        n_users_(static_cast<int>(last_user - first_user)),
        step_(padded(args.dim)),
        parts_{room} {}

  void run() {
    embed();
    for (int i = 0; i + 1 < args_.n_blocks; i++) full_block(args_.blocks[i]);
    last_block(args_.blocks[args_.n_blocks - 1]);
  }

 private:
  // x = LN(item + position); the padding of a row is 0 from here on
  void embed() {
    const int dim = args_.dim;
    int64_t slots = 0;
    for (int user = 0; user < n_users_; user++) slots += args_.lengths[first_user_ + user];
    x_ = parts_.take(slots * step_);
    int row = 0;
    most_keys_ = 0;
    for (int user = 0; user < n_users_; user++) {
      const int64_t* items = args_.items + (first_user_ + user) * args_.width;
      const int length = static_cast<int>(args_.lengths[first_user_ + user]);
      int n_keys = 0;
      users_.first_row[user] = row;
      for (int j = 0; j < length; j++) {
        const bool is_key = items[j] != args_.pad_id;
        if (!is_key && (j < length - 1 || n_keys == 0)) continue;
        n_keys += is_key;
        float* to = x_ + static_cast<int64_t>(row++) * step_;
        layer_norm_rows(args_.table + items[j] * dim, dim,
                        args_.positions + int64_t{1} * (args_.window - length + j) * dim, dim, 1, dim,
                        args_.norm_weight, args_.norm_bias, args_.eps, to, step_);
        for (int d = dim; d < step_; d++) to[d] = 0.0f;
      }
      users_.n_keys[user] = n_keys;
      if (n_keys > most_keys_) most_keys_ = n_keys;
    }
    users_.first_row[n_users_] = row;
  }

  void finish(const Rest& rest, float* x, const float* gathered, int gathered_step, int rows, float* room) {
    float* const y = room;
    linear_spread(rest.out, gathered, gathered_step, rows, y, step_);
    layer_norm_rows(y, step_, x, step_, rows, args_.dim, rest.norm_1.weight, rest.norm_1.bias, args_.eps, x, step_);
    feed_forward(rest.up, rest.down, rest.norm_2, args_.gelu, args_.eps, x, step_, rows, room);
  }

  void full_block(const float* weights) {
    const int dim = args_.dim, heads = args_.heads, width = dim / heads, qkv_step = padded(3 * dim);
    const int rows = users_.first_row[n_users_];
    float* const before = parts_.at;
    Layers layers{weights};
    const Linear qkv = layers.layer(dim, 3 * dim);
    const Rest rest = rest_of(layers, dim, args_.hidden);
    float* const projected = parts_.take(int64_t{1} * rows * qkv_step);
    const int gathered_step = step_ + kPanel;
    float* const gathered = parts_.take(int64_t{1} * rows * gathered_step);
    const KeyPanels most = {nullptr, nullptr, heads, width, most_keys_};
    float* const keys = parts_.take(most.key_floats());
    float* const values = parts_.take(most.value_floats());
    float* const scores = parts_.take(int64_t{1} * (most_keys_ + 1) * padded(most_keys_));
    linear_spread(qkv, x_, step_, rows, projected, qkv_step);
    for (int user = 0; user < n_users_; user++) {
      const int first = users_.first_row[user], n_rows = users_.first_row[user + 1] - first;
      if (n_rows == 0) continue;
      const KeyPanels panels = {keys, values, heads, width, users_.n_keys[user]};
      const float* of_user = projected + int64_t{1} * first * qkv_step;
      clear_tails(panels);
      for (int i = 0; i < panels.n_keys; i++) {
        const float* of_row = of_user + int64_t{1} * i * qkv_step;
        put_key(panels, i, of_row + dim, of_row + 2 * dim);
      }
      attend_rows(panels, of_user, qkv_step, n_rows, 1, gathered + int64_t{1} * first * gathered_step, gathered_step,
                  scores);
    }
    float* const chunk_room = parts_.take(int64_t{kPaddedChunk} * (padded(args_.hidden) + step_));
    for (int row = 0; row < rows; row += kPaddedChunk) {
      const int n = rows - row < kPaddedChunk ? rows - row : kPaddedChunk;
      finish(rest, x_ + int64_t{1} * row * step_, gathered + int64_t{1} * row * gathered_step, gathered_step, n,
             chunk_room);
    }
    parts_.at = before;
  }

  // Only the newest row of each user: q . (W_k x_j) is (W_k^T q) . x_j, and the value map follows the weighted sum.
  void last_block(const float* weights) {
    const int dim = args_.dim, heads = args_.heads, width = dim / heads;
    Layers layers{weights};
    const Linear query = layers.layer(dim, dim);
    const float* const key_maps = layers.at;
    layers.take(heads * int64_t{1} * step_ * width);
    const float* const value_maps = layers.at;
    layers.take(heads * int64_t{1} * padded(width) * (dim + 1));
    const Rest rest = rest_of(layers, dim, args_.hidden);

    // users that have a key, side by side
    int of[kPaddedUsers], n = 0;
    for (int user = 0; user < n_users_; user++) {
      if (users_.n_keys[user] > 0) of[n++] = user;
    }
    const int64_t wide = int64_t{1} * heads * step_;
    const int gathered_step = step_ + kPanel;
    float* const x = parts_.take(int64_t{1} * n * step_);
    float* const q = parts_.take(int64_t{1} * n * step_);
    float* const keyed = parts_.take(n * wide);
    float* const gathered = parts_.take(int64_t{1} * n * gathered_step);
    float* const weight = parts_.take(int64_t{1} * heads * padded(most_keys_));
    float* const room = parts_.take(int64_t{1} * n * (padded(args_.hidden) + step_));
    for (int i = 0; i < n; i++) {
      const float* newest = x_ + int64_t{1} * (users_.first_row[of[i] + 1] - 1) * step_;
      for (int d = 0; d < step_; d += kLanes) store(x + i * step_ + d, load(newest + d));
    }
    linear_spread(query, x, step_, n, q, step_);
    for (int head = 0; head < heads; head++) {
      const Linear map = {key_maps + int64_t{1} * head * step_ * width, nullptr, width, dim};
      linear_spread(map, q + head * width, step_, n, keyed + head * step_, wide);
    }
    for (int i = 0; i < n; i++) {  // what is gathered replaces what asked for it
      const float* rows = x_ + int64_t{1} * users_.first_row[of[i]] * step_;
      for (int head = 0; head < heads; head++) {
        mix(rows, users_.n_keys[of[i]], keyed + i * wide + head * step_, weight);
      }
    }
    for (int head = 0; head < heads; head++) {
      const float* map = value_maps + int64_t{1} * head * padded(width) * (dim + 1);
      const Linear value = {map, map + int64_t{1} * padded(width) * dim, dim, width};
      // the padding of a head is overwritten by the next one, or lies behind the row
      linear_spread(value, keyed + head * step_, wide, n, gathered + head * width, gathered_step);
    }
    finish(rest, x, gathered, gathered_step, n, room);
    int done = 0;
    for (int user = 0; user < n_users_; user++) {
      const bool empty = users_.n_keys[user] == 0;
      const float* from = empty ? args_.empty : x + int64_t{1} * done * step_;
      done += !empty;
      float* to = args_.context + (first_user_ + user) * args_.dim;
      for (int d = 0; d < dim; d++) to[d] = from[d];
    }
  }

  // keyed = sum_j softmax_j(keyed . x_j) x_j over a user's keys
  void mix(const float* rows, int n_keys, float* keyed, float* weight) {
    for (int j = 0; j < n_keys; j++) {
      const float* row = rows + int64_t{1} * j * step_;
      Vec total = zero();
      for (int d = 0; d < step_; d += kLanes) total = fma(load(keyed + d), load(row + d), total);
      weight[j] = sum(total);
    }
    softmax_row(weight, n_keys);
    constexpr int kGroup = 8;
    for (int d = 0; d < step_;) {
      const int left = (step_ - d) / kLanes;
      Vec sums[kGroup];
      if (left >= kGroup) {
        weigh<kGroup>(rows + d, n_keys, weight, sums);
        for (int g = 0; g < kGroup; g++, d += kLanes) store(keyed + d, sums[g]);
      } else {
        weigh<1>(rows + d, n_keys, weight, sums);
        store(keyed + d, sums[0]);
        d += kLanes;
      }
    }
  }

  template <int G>
  FASTDIFF_INLINE void weigh(const float* rows, int n_keys, const float* weight, Vec* sums) {
    Vec total[G];
    for (int g = 0; g < G; g++) total[g] = zero();
    for (int j = 0; j < n_keys; j++) {
      const Vec by = set1(weight[j]);
      for (int g = 0; g < G; g++) total[g] = fma(by, load(rows + int64_t{1} * j * step_ + g * kLanes), total[g]);
    }
    for (int g = 0; g < G; g++) sums[g] = total[g];
  }

  const PaddedHistoryArgs& args_;
  const int64_t first_user_;
  const int n_users_, step_;
  Room parts_;
  float* x_ = nullptr;
  int most_keys_ = 0;
  Users users_;
};

}  // namespace

void encode_padded_history(const PaddedHistoryArgs& args, int64_t first_user, int64_t last_user, float* room) {
  Encoder(args, first_user, last_user, room).run();
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
