// levels: baseline avx2 avx512
#include "causal_history.h"

#include "attention.h"
#include "rows.h"
#include "transformer.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

void copy(const float* from, int n, float* to) {
  for (int at = 0; at < n; at += kLanes) store_n(to + at, load_n(from + at, lanes_left(n, at)), lanes_left(n, at));
}

// Row r's item, of the user whose rows begin at `begin`.
const float* item_of(const CausalHistoryArgs& args, int64_t user, int64_t begin, int64_t r) {
  return args.item_table + args.items[user * args.items_step + (r - begin) + args.item_shift] * args.shape.dim;
}

// to = y input_scale + time, then + condition where there is one; y is the item, on the unit sphere if it is to be, a norm
// under 1e-12 counting as 1e-12.
void clean_input(const CausalHistoryArgs& args, const float* item, const float* condition, float* to) {
  const int dim = args.shape.dim;
  float norm = 1.0f;
  if (args.normalize) {
    Vec squares = zero();
    for (int at = 0; at < dim; at += kLanes) {
      const Vec part = load_n(item + at, lanes_left(dim, at));
      squares = fma(part, part, squares);
    }
    norm = __builtin_sqrtf(sum(squares));
    if (norm < 1e-12f) norm = 1e-12f;
  }
  const Vec by = set1(args.input_scale);
  for (int at = 0; at < dim; at += kLanes) {
    const int n = lanes_left(dim, at);
    Vec y = load_n(item + at, n);
    if (args.normalize) y = y / set1(norm);
    y = by * y + load_n(args.time + at, n);
    if (condition != nullptr) y = load_n(condition + at, n) + y;
    store_n(to + at, y, n);
  }
}

void make_input(const CausalHistoryArgs& args, const CausalTile& tile) {
  const int dim = args.shape.dim, step = args.shape.step();
  for (int64_t user = tile.first_user; user < tile.last_user; user++) {
    const int64_t begin = args.starts[user];
    const int64_t first = begin > tile.first_row ? begin : tile.first_row;
    const int64_t last = args.starts[user + 1] < tile.last_row ? args.starts[user + 1] : tile.last_row;
    for (int64_t r = first; r < last; r++) {  // the table is large, and its rows are read in no order
      const float* item = item_of(args, user, begin, r);
      for (int at = 0; at < dim; at += kPanel) __builtin_prefetch(item + at);
    }
    for (int64_t r = first; r < last; r++) {
      const float* item = item_of(args, user, begin, r);
      float* const to = tile.x + r * step;
      if (args.norm_weight != nullptr) {
        layer_norm_rows(item, dim, nullptr, 0, 1, dim, args.norm_weight, args.norm_bias, args.norm_eps, to, step);
        continue;
      }
      const int64_t place = tile.pass == 0 ? (args.condition_starts[user] + (r - begin)) * dim : 0;
      clean_input(args, item, tile.pass == 0 ? args.condition + place : nullptr, to);
    }
  }
}

// Queries, keys and values of the tile's rows; where nobody attends any more, or only the last rows do, no queries.
void project(const CausalHistoryArgs& args, const CausalTile& tile, int layer) {
  const BlockShape& shape = args.shape;
  const int dim = shape.dim, step = shape.step(), qkv_step = shape.qkv_step();
  const Block block(args.blocks[layer], shape);
  const bool queries = layer < args.n_blocks - 1 || args.rows != nullptr;
  const int n = static_cast<int>(tile.last_row - tile.first_row);
  linear_spread(block.qkv, tile.x + tile.first_row * step, step, n, tile.qkv + tile.first_row * qkv_step, qkv_step,
                queries ? 0 : dim / kPanel);
  if (args.keys_values == nullptr) return;
  float* to = args.keys_values + (static_cast<int64_t>(layer) * args.passes + tile.pass) * args.n_rows() * 2 * dim;
  for (int64_t r = tile.first_row; r < tile.last_row; r++) {
    copy(tile.qkv + r * qkv_step + dim, 2 * dim, to + r * 2 * dim);
  }
}

// The keys and values of one user's rows up to `end`, the pad's in front, and the bias of the keys.
struct UserKeys {
  KeyValues cache;
  float* bias;
};

UserKeys keys_of(const CausalHistoryArgs& args, const CausalTile& tile, int layer, int64_t user, int64_t end,
                 float*& at) {
  const BlockShape& shape = args.shape;
  const int dim = shape.dim, width = dim / shape.heads, qkv_step = shape.qkv_step();
  const int64_t begin = args.starts[user];
  const int n_keys = static_cast<int>(end - begin) + 1;
  float* const keys = at;
  float* const values = keys + key_floats(shape.heads, width, n_keys);
  float* const bias = values + value_floats(shape.heads, width, n_keys);
  at = bias + padded(n_keys);
  const KeyValues cache = {keys, values, shape.heads, width, n_keys};
  const float* pad = args.pads + (static_cast<int64_t>(layer) * args.pad_passes + tile.pass) * 2 * dim;
  clear_keys(cache, n_keys);
  put_keys(cache, 0, 1, pad, pad + dim, 0);
  const float* row = tile.seen + begin * qkv_step + dim;
  put_keys(cache, 1, n_keys - 1, row, row + dim, qkv_step);
  for (int i = 0; i < padded(n_keys); i++) bias[i] = 0.0f;
  bias[0] = args.log_pads[user];
  return {cache, bias};
}

void finish_rows(const CausalHistoryArgs& args, const CausalTile& tile, int layer, float* room) {
  const BlockShape& shape = args.shape;
  const int step = shape.step(), qkv_step = shape.qkv_step();
  const int n = static_cast<int>(tile.last_row - tile.first_row);
  float* const gathered = room;
  float* const rest = gathered + static_cast<int64_t>(n) * step;
  for (int64_t user = tile.first_user; user < tile.last_user; user++) {
    const int64_t begin = args.starts[user];
    const int64_t first = begin > tile.first_row ? begin : tile.first_row;
    const int64_t last = args.starts[user + 1] < tile.last_row ? args.starts[user + 1] : tile.last_row;
    if (first >= last) continue;
    float* at = rest;
    const UserKeys of_user = keys_of(args, tile, layer, user, last, at);
    attend_causal(of_user.cache, tile.seen + first * qkv_step, qkv_step, static_cast<int>(last - first), of_user.bias,
                  static_cast<int>(first - begin) + 2, gathered + (first - tile.first_row) * step, step, at);
  }
  const Block block(args.blocks[layer], shape);
  int done = 0;
  for (int parts = (n + kMostRows - 1) / kMostRows; parts > 0; parts--) {
    const int some = (n - done + parts - 1) / parts;
    float* const x = tile.x + (tile.first_row + done) * step;
    finish_block(block, x, gathered + static_cast<int64_t>(done) * step, some, rest, Alone{});
    done += some;
  }
}

// The last block for the last row of each history alone, a few histories at a time.
void finish_last(const CausalHistoryArgs& args, const CausalTile& tile, int layer, float* room) {
  const BlockShape& shape = args.shape;
  const int dim = shape.dim, step = shape.step(), qkv_step = shape.qkv_step();
  const Block block(args.blocks[layer], shape);
  float* const h = room;
  float* const gathered = h + kMostRows * step;
  float* const query = gathered + kMostRows * step;
  float* const rest = query + kMostRows * qkv_step;
  int64_t user = tile.first_user;
  while (user < tile.last_user) {
    int64_t of[kMostRows];
    int n = 0;
    for (; user < tile.last_user && n < kMostRows; user++) {
      const int64_t end = args.starts[user + 1];
      if (args.starts[user] == end || end <= tile.first_row || end > tile.last_row) continue;
      copy(tile.x + (end - 1) * step, dim, h + n * step);
      of[n++] = user;
    }
    if (n == 0) return;
    linear_spread(block.qkv, h, step, n, query, qkv_step, 0, padded(dim) / kPanel);
    for (int i = 0; i < n; i++) {
      float* at = rest;
      const UserKeys of_user = keys_of(args, tile, layer, of[i], args.starts[of[i] + 1], at);
      attend(of_user.cache, query + i * qkv_step, false, of_user.bias, of_user.cache.n_keys, nullptr, nullptr,
             gathered + i * step, at);
    }
    finish_block(block, h, gathered, n, rest, Alone{});
    for (int i = 0; i < n; i++) copy(h + i * step, dim, args.last + of[i] * dim);
  }
}

void give_rows(const CausalHistoryArgs& args, const CausalTile& tile) {
  const int dim = args.shape.dim, step = args.shape.step();
  for (int64_t r = tile.first_row; r < tile.last_row; r++) copy(tile.x + r * step, dim, args.rows + r * dim);
  for (int64_t user = tile.first_user; user < tile.last_user; user++) {
    const int64_t end = args.starts[user + 1];
    if (args.starts[user] == end || end <= tile.first_row || end > tile.last_row) continue;
    copy(tile.x + (end - 1) * step, dim, args.last + user * dim);
  }
}

}  // namespace

void causal_stage(const CausalHistoryArgs& args, const CausalTile& tile, int stage, float* room) {
  if (stage == 0) {
    make_input(args, tile);
  } else if (stage == args.n_blocks && args.only_last()) {
    finish_last(args, tile, stage - 1, room);
  } else {
    finish_rows(args, tile, stage - 1, room);
    if (stage == args.n_blocks) give_rows(args, tile);
  }
  if (stage < args.n_blocks) project(args, tile, stage);
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
