// denoise_attention_loop and causal_stage against plain loops in double, over odd sizes, at every level.
#include <algorithm>
#include <memory>
#include <thread>

#include "../cpu/causal_history.h"
#include "../cpu/denoise_attention_loop.h"
#include "../cpu/thread_pool.h"
#include "layers.h"

namespace fastdiff {
namespace tests {
namespace {

// --- a block, packed and in double ------------------------------------------------------------------------------------

struct BlockInDouble {
  int heads;
  double eps = 1e-12;
  Dense qkv, out, up, down;
  Norm norm_1, norm_2;

  BlockInDouble(Draws& draws, const BlockShape& shape)
      : heads(shape.heads),
        qkv(draws, shape.dim, 3 * shape.dim),
        out(draws, shape.dim, shape.dim),
        up(draws, shape.dim, shape.hidden),
        down(draws, shape.hidden, shape.dim),
        norm_1(draws, shape.dim),
        norm_2(draws, shape.dim) {}

  Floats packed() const {
    Floats all;
    pack(all, qkv), pack(all, out), pack(all, norm_1), pack(all, up), pack(all, down), pack(all, norm_2);
    return all;
  }

  // keys: rows [key, value]; how many equal ones each stands for
  Row attend(const Row& query, const Rows& keys, const Row& counts, bool even) const {
    const int dim = static_cast<int>(out.n_in), width = dim / heads;
    Row gathered(dim, 0.0);
    for (int h = 0; h < heads; h++) {
      Row logits(keys.size(), 0.0);
      double top = -INFINITY;
      for (size_t k = 0; k < keys.size(); k++) {
        for (int d = h * width; d < (h + 1) * width && !even; d++) logits[k] += query[d] * keys[k][d];
        if (counts[k] > 0) top = std::fmax(top, logits[k]);
      }
      double total = 0;
      for (size_t k = 0; k < keys.size(); k++) total += counts[k] > 0 ? counts[k] * std::exp(logits[k] - top) : 0;
      for (size_t k = 0; k < keys.size(); k++) {
        const double weight = counts[k] > 0 ? counts[k] * std::exp(logits[k] - top) / total : 0;
        for (int d = h * width; d < (h + 1) * width; d++) gathered[d] += weight * keys[k][dim + d];
      }
    }
    return gathered;
  }

  Row finish(const Row& x, const Row& gathered) const {
    Row h = out(gathered);
    for (size_t i = 0; i < h.size(); i++) h[i] += x[i];
    h = norm_1(h, eps);
    Row wide = up(h);
    for (double& u : wide) u = 0.5 * u * (1 + std::tanh(std::sqrt(2 / M_PI) * (u + 0.044715 * u * u * u)));
    Row y = down(wide);
    for (size_t i = 0; i < y.size(); i++) y[i] += h[i];
    return norm_2(y, eps);
  }
};

// --- the loop -------------------------------------------------------------------------------------------------------

void check_loop(int heads, int width, const std::vector<int64_t>& slots, int branches, int samples, bool philox) {
  const int dim = heads * width, steps = 3, n_blocks = 2;
  const BlockShape shape = {dim, 2 * dim + 1, heads, 1e-12f};
  Draws draws(static_cast<uint64_t>(dim * 100 + branches * 10 + samples));
  const int64_t users = static_cast<int64_t>(slots.size()), rows = users * samples;
  std::vector<int64_t> starts(1, 0);
  for (const int64_t n : slots) starts.push_back(starts.back() + n);

  std::vector<BlockInDouble> blocks;
  std::vector<Floats> packed;
  for (int layer = 0; layer < n_blocks; layer++) {
    blocks.emplace_back(draws, shape);
    packed.push_back(blocks.back().packed());
    EXPECT(static_cast<int64_t>(packed.back().size()) == block_floats(shape), "a packed block's size");
  }
  const float* const pointers[] = {packed[0].data(), packed[1].data()};
  const Floats x_t = draws.normals(rows * dim), cond = draws.normals(branches * users * dim);
  const Floats cache = draws.normals(n_blocks * branches * starts.back() * 2 * dim);
  const Floats pad = draws.normals(n_blocks * branches * 2 * dim), time = draws.normals(steps * dim);
  const Floats noise = draws.normals(steps * rows * dim);
  std::vector<double> coef = {0.5, 0.4, 0.3, 0.7, 0.0, philox ? 0.0 : 0.2, 1.0, 0.3, 0.0};
  if (philox) coef[2] = 0.0;  // the numbers have a test of their own
  Floats log_pads;
  const std::unique_ptr<bool[]> uniform(new bool[static_cast<size_t>(users)]);
  for (int64_t user = 0; user < users; user++) {
    log_pads.push_back(std::log(static_cast<float>(user % 3)));
    uniform[user] = user % 4 == 1;
  }
  const std::vector<int64_t> row_key(rows, 5), sample(rows, 1);

  AttentionLoopArgs args{};
  args.shape = shape, args.blocks = pointers, args.n_blocks = n_blocks, args.branches = branches;
  args.rows = rows, args.users = users, args.samples = samples, args.steps = steps;
  args.x_t = x_t.data(), args.cond = cond.data(), args.keys_values = cache.data(), args.starts = starts.data();
  args.pad = pad.data(), args.log_pads = log_pads.data(), args.uniform = uniform.get(), args.time = time.data();
  args.coef = coef.data(), args.noise = philox ? nullptr : noise.data();
  args.row_key = philox ? row_key.data() : nullptr, args.sample = philox ? sample.data() : nullptr;
  args.guidance_scale = 1.5f, args.input_scale = 0.4f, args.normalize = true;

  std::vector<double> want;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t user = row / samples;
    Row x = row_of(x_t, row, dim);
    for (int i = 0; i < steps; i++) {
      Rows outputs;
      for (int branch = 0; branch < branches; branch++) {
        Row h = row_of(cond, branch * users + user, dim);
        for (int d = 0; d < dim; d++) h[d] += 0.4f * x[d] + time[i * dim + d];
        for (int layer = 0; layer < n_blocks; layer++) {
          const int64_t pass = layer * branches + branch;
          const Row qkv = blocks[layer].qkv(h);
          Rows keys = {row_of(pad, pass, 2 * dim)};
          Row counts = {static_cast<double>(user % 3)};
          for (int64_t slot = starts[user]; slot < starts[user + 1]; slot++) {
            keys.push_back(row_of(cache, pass * starts.back() + slot, 2 * dim));
            counts.push_back(1);
          }
          keys.push_back(Row(qkv.begin() + dim, qkv.end()));
          counts.push_back(1);
          h = blocks[layer].finish(h, blocks[layer].attend(qkv, keys, counts, uniform[user]));
        }
        outputs.push_back(h);
      }
      double squares = 0;
      for (int d = 0; d < dim; d++) {
        const double c = outputs.front()[d], u = outputs.back()[d], output = branches == 1 ? c : u + 1.5 * (c - u);
        x[d] = coef[3 * i] * output + coef[3 * i + 1] * x[d] +
               (philox ? 0.0 : coef[3 * i + 2] * noise[(i * rows + row) * dim + d]);
        squares += x[d] * x[d];
      }
      for (double& v : x) v /= std::sqrt(squares);
    }
    want.insert(want.end(), x.begin(), x.end());
  }

  const std::string what = "loop, " + std::to_string(heads) + " heads of " + std::to_string(width);
  Floats whole(rows * dim, kNaN), parts(rows * dim, kNaN);
  for (Floats* x_0 : {&whole, &parts}) {
    args.x_0 = x_0->data();
    const int64_t some = x_0 == &whole ? rows : 2, tasks = (rows + some - 1) / some;
    parallel(3, tasks, [&](int64_t task) {
      const int64_t first = task * some, last = std::min(rows, first + some);
      Floats room(attention_loop_floats(args, first, last), kNaN);
      FASTDIFF_PICK(denoise_attention_loop)(args, first, last, room.data());
    });
  }
  expect_close(whole, want, 2e-4, what);
  EXPECT(whole == parts, what, ": a row's bits depend on the rows beside it");
  if (heads < 2) return;
  for (const int members : {2, 3}) {
    std::vector<float> together(rows * dim, kNaN);
    args.x_0 = together.data();
    Team team(meetings_of_step(args), std::min(members, heads), std::chrono::minutes(1));
    AttentionLoopShared shared{};
    std::vector<std::thread> helpers;
    for (int helper = 1; helper < members; helper++) {  // one more than heads finds no place
      helpers.emplace_back([&] {
        std::vector<float> room(loop_own_floats(args, rows, most_keys_of(args, 0, users - 1)), kNaN);
        FASTDIFF_PICK(help_attention_loop)(args, team, shared, room.data());
      });
    }
    while (team.members() < std::min(members, heads)) std::this_thread::yield();
    std::vector<float> room(attention_loop_floats(args, 0, rows, true), kNaN);
    const bool stayed = FASTDIFF_PICK(lead_attention_loop)(args, team, shared, room.data());
    for (std::thread& helper : helpers) helper.join();
    EXPECT(stayed, what, ": the team broke up");
    EXPECT(whole == together, what, ": a row's bits depend on how many compute it");
  }
  std::vector<float> alone(rows * dim, kNaN);  // one came and never does anything: the leader goes on without it
  args.x_0 = alone.data();
  Team team(meetings_of_step(args), 2);
  AttentionLoopShared shared{};
  EXPECT(team.join() == 1, "the first place");
  std::vector<float> room(attention_loop_floats(args, 0, rows, true), kNaN);
  EXPECT(!FASTDIFF_PICK(lead_attention_loop)(args, team, shared, room.data()), what, ": a team of one that sleeps");
  EXPECT(whole == alone, what, ": a row's bits depend on a team that broke up");
}

// --- histories ------------------------------------------------------------------------------------------------------

enum class Kind { rows, last, prefix };

void check_history(int heads, int width, const std::vector<int64_t>& lengths, int n_blocks, Kind kind) {
  const int dim = heads * width, passes = kind == Kind::prefix ? 2 : 1, n_items = 7;
  const BlockShape shape = {dim, 3 * dim, heads, 1e-12f};
  Draws draws(static_cast<uint64_t>(dim * 100 + n_blocks));
  const int64_t users = static_cast<int64_t>(lengths.size());
  int64_t longest = 0;
  std::vector<int64_t> starts(1, 0), all_starts(1, 0);
  for (const int64_t n : lengths) {
    longest = std::max(longest, n);
    starts.push_back(starts.back() + (kind == Kind::prefix ? std::max<int64_t>(n - 1, 0) : n));
    all_starts.push_back(all_starts.back() + n);
  }
  const int64_t rows = starts.back();

  std::vector<BlockInDouble> blocks;
  std::vector<Floats> packed;
  std::vector<const float*> pointers;
  for (int layer = 0; layer < n_blocks; layer++) {
    blocks.emplace_back(draws, shape);
    packed.push_back(blocks.back().packed());
  }
  for (const auto& block : packed) pointers.push_back(block.data());
  const Norm norm(draws, dim);
  Floats packed_norm;
  pack(packed_norm, norm);
  const Floats table = draws.normals(n_items * dim), time = draws.normals(dim);
  const Floats pads = draws.normals(n_blocks * passes * 2 * dim);
  const Floats condition = draws.normals(all_starts.back() * dim);
  std::vector<int64_t> items(users * longest, -1);
  Floats log_pads;
  for (int64_t user = 0; user < users; user++) {
    for (int64_t i = 0; i < lengths[user]; i++) items[user * longest + i] = draws.below(n_items);
    log_pads.push_back(std::log(static_cast<float>(user % 3)));
  }

  CausalHistoryArgs args{};
  args.shape = shape, args.blocks = pointers.data(), args.n_blocks = n_blocks, args.passes = passes, args.users = users;
  args.starts = starts.data(), args.pads = pads.data(), args.pad_passes = passes, args.log_pads = log_pads.data();
  args.items = items.data(), args.items_step = longest, args.item_table = table.data();
  if (kind == Kind::prefix) {
    args.item_shift = 1, args.condition = condition.data(), args.condition_starts = all_starts.data();
    args.time = time.data(), args.input_scale = 0.7f, args.normalize = true;
  } else {
    args.norm_weight = packed_norm.data(), args.norm_bias = args.norm_weight + shape.step(), args.norm_eps = 1e-12f;
  }

  // in double
  std::vector<double> want_rows(kind == Kind::rows ? rows * dim : 0), want_last;
  std::vector<double> want_keys(kind == Kind::prefix ? n_blocks * passes * rows * 2 * dim : 0);
  for (int pass = 0; pass < passes; pass++) {
    for (int64_t user = 0; user < users; user++) {
      Rows x;
      for (int64_t j = 0; j < starts[user + 1] - starts[user]; j++) {
        Row e = row_of(table, items[user * longest + j + args.item_shift], dim);
        if (kind != Kind::prefix) {
          e = norm(e, 1e-12);
        } else {
          double squares = 0;
          for (const double v : e) squares += v * v;
          for (int d = 0; d < dim; d++) {
            e[d] = 0.7f * e[d] / std::sqrt(squares) + time[d];
            if (pass == 0) e[d] += condition[(all_starts[user] + j) * dim + d];
          }
        }
        x.push_back(e);
      }
      for (int layer = 0; layer < n_blocks; layer++) {
        Rows keys = {row_of(pads, layer * passes + pass, 2 * dim)};
        Row counts = {static_cast<double>(user % 3)};
        for (size_t j = 0; j < x.size(); j++) {
          const Row qkv = blocks[layer].qkv(x[j]);
          keys.push_back(Row(qkv.begin() + dim, qkv.end()));
          counts.push_back(1);
          x[j] = blocks[layer].finish(x[j], blocks[layer].attend(qkv, keys, counts, false));
          if (kind == Kind::prefix) {
            const int64_t row = (int64_t{layer} * passes + pass) * rows + starts[user] + static_cast<int64_t>(j);
            std::copy(keys.back().begin(), keys.back().end(), want_keys.begin() + row * 2 * dim);
          }
        }
      }
      for (size_t j = 0; j < x.size() && kind == Kind::rows; j++) {
        std::copy(x[j].begin(), x[j].end(), want_rows.begin() + (starts[user] + static_cast<int64_t>(j)) * dim);
      }
      const Row none(dim, 0.0);  // an empty history's last row is not written
      if (kind != Kind::prefix) want_last.insert(want_last.end(), x.empty() ? none.begin() : x.back().begin(),
                                                 x.empty() ? none.end() : x.back().end());
    }
  }

  const std::string what = "history, " + std::to_string(heads) + " heads of " + std::to_string(width);
  std::vector<Floats> results;
  for (const int64_t tiles : {1, 2, 5}) {
    Floats made_rows(want_rows.size(), kNaN), last(want_last.size(), 0.0f), keys(want_keys.size(), kNaN);
    args.rows = kind == Kind::rows ? made_rows.data() : nullptr;
    args.last = kind == Kind::prefix ? nullptr : last.data();
    args.keys_values = kind == Kind::prefix ? keys.data() : nullptr;
    std::vector<Floats> x(passes), even(passes), odd(passes);
    for (int pass = 0; pass < passes; pass++) {
      x[pass].assign(rows * shape.step(), kNaN);
      even[pass].assign(rows * shape.qkv_step(), kNaN), odd[pass] = even[pass];
    }
    for (int stage = 0; stage < args.stages(); stage++) {
      parallel(3, tiles * passes, [&](int64_t task) {
        CausalTile tile{};
        tile.pass = static_cast<int>(task / tiles);
        tile.first_row = rows * (task % tiles) / tiles, tile.last_row = rows * (task % tiles + 1) / tiles;
        while (tile.first_user < users && starts[tile.first_user + 1] <= tile.first_row) tile.first_user++;
        tile.last_user = tile.first_user;
        while (tile.last_user < users && starts[tile.last_user] < tile.last_row) tile.last_user++;
        tile.x = x[tile.pass].data();
        tile.qkv = (stage % 2 ? odd : even)[tile.pass].data(), tile.seen = (stage % 2 ? even : odd)[tile.pass].data();
        Floats room(causal_stage_floats(args, tile.last_row - tile.first_row, longest), kNaN);
        FASTDIFF_PICK(causal_stage)(args, tile, stage, room.data());
      });
    }
    expect_close(made_rows, want_rows, 2e-4, what);
    expect_close(last, want_last, 2e-4, what);
    expect_close(keys, want_keys, 2e-4, what);
    made_rows.insert(made_rows.end(), last.begin(), last.end());
    made_rows.insert(made_rows.end(), keys.begin(), keys.end());
    results.push_back(made_rows);
    EXPECT(results.back() == results.front(), what, ": a row's bits depend on how the rows are cut");
  }
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff::tests;
  const std::vector<std::pair<int, int>> sizes = {{1, 1}, {2, 3}, {5, 4}, {4, 8}, {3, 18}, {4, 16}, {2, 32}, {1, 65}};
  at_every_level([&] {
    for (const auto& [heads, width] : sizes) {
      for (const int branches : {1, 2}) {
        check_loop(heads, width, {3, 0, 15, 16, 1, 31, 50}, branches, 1, false);
        check_loop(heads, width, {2, 17, 0}, branches, 3, true);
      }
      for (const Kind kind : {Kind::rows, Kind::last, Kind::prefix}) {
        check_history(heads, width, {5, 0, 1, 18, 2, 34}, 2, kind);
        check_history(heads, width, {16, 1}, 1, kind);
      }
    }
  });
  return 0;
}
