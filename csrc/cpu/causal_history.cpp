#include "causal_history.h"

#include <cmath>
#include <memory>

#include "../history_tensors.h"
#include "scratch.h"
#include "thread_pool.h"
#include "transformer_tensors.h"

namespace fastdiff {

namespace {

constexpr int64_t kRowsOfTile = 48;   // enough for a task to be worth handing out
constexpr int64_t kFewestRows = 8;    // of a thread, for a history to be cut among threads

// Users first .. last - 1 and their rows.
struct Share {
  int64_t first_user, last_user;
};

// Whole histories, about `rows` rows of them at a time.
std::vector<Share> shares_of(const std::vector<int64_t>& starts, int64_t rows) {
  std::vector<Share> shares;
  const int64_t users = static_cast<int64_t>(starts.size()) - 1;
  for (int64_t first = 0, user = 1; user <= users; user++) {
    if (user == users || starts[user + 1] - starts[first] > rows) {
      if (starts[user] > starts[first]) shares.push_back({first, user});
      first = user;
    }
  }
  return shares;
}

int64_t longest_of(const CausalHistoryArgs& args, int64_t first_user, int64_t last_user) {
  int64_t longest = 0;
  for (int64_t user = first_user; user < last_user; user++) {
    longest = std::max(longest, args.starts[user + 1] - args.starts[user]);
  }
  return longest;
}

// All stages of whole histories, one task for some of them.
template <class Kernel>
void run_whole(const CausalHistoryArgs& args, int threads, const std::vector<Share>& shares, Kernel kernel) {
  const int64_t step = args.shape.step(), qkv_step = args.shape.qkv_step();
  const int64_t n = static_cast<int64_t>(shares.size());
  parallel(threads, n * args.passes, [&](int64_t task) {
    const Share& share = shares[task % n];
    CausalTile tile{};
    tile.pass = static_cast<int>(task / n);
    tile.first_user = share.first_user, tile.last_user = share.last_user;
    tile.first_row = args.starts[share.first_user], tile.last_row = args.starts[share.last_user];
    const int64_t rows = tile.last_row - tile.first_row;
    const int64_t room = causal_stage_floats(args, rows, longest_of(args, share.first_user, share.last_user));
    float* const memory = scratch(rows * (step + qkv_step) + room);
    tile.x = memory - tile.first_row * step;
    tile.seen = tile.qkv = memory + rows * step - tile.first_row * qkv_step;
    for (int stage = 0; stage < args.stages(); stage++) kernel(args, tile, stage, memory + rows * (step + qkv_step));
  });
}

// One stage after another, the rows of each pass cut into `tiles` parts.
template <class Kernel>
void run_in_step(const CausalHistoryArgs& args, int threads, int64_t tiles, Kernel kernel) {
  const int64_t step = args.shape.step(), qkv_step = args.shape.qkv_step(), rows = args.n_rows();
  const int64_t of_pass = rows * (step + 2 * qkv_step);  // a tile may be a stage ahead of one that sees its keys
  const std::unique_ptr<float[]> memory(new float[args.passes * of_pass]);
  const int64_t longest = longest_of(args, 0, args.users);
  for (int stage = 0; stage < args.stages(); stage++) {
    parallel(threads, tiles * args.passes, [&](int64_t task) {
      CausalTile tile{};
      tile.pass = static_cast<int>(task / tiles);
      tile.first_row = rows * (task % tiles) / tiles, tile.last_row = rows * (task % tiles + 1) / tiles;
      tile.x = memory.get() + tile.pass * of_pass;
      tile.qkv = tile.x + rows * step + stage % 2 * rows * qkv_step;
      tile.seen = tile.x + rows * step + (stage + 1) % 2 * rows * qkv_step;
      const auto* ends = args.starts + 1;
      tile.first_user = std::upper_bound(ends, ends + args.users, tile.first_row) - ends;
      tile.last_user = std::lower_bound(ends, ends + args.users, tile.last_row) - ends + 1;
      kernel(args, tile, stage, scratch(causal_stage_floats(args, tile.last_row - tile.first_row, longest)));
    });
  }
}

void run(const CausalHistoryArgs& args, const std::vector<int64_t>& starts) {
  const int threads = num_threads();
  const int64_t rows = args.n_rows();
  if (rows == 0) return;
  const auto kernel = FASTDIFF_PICK(causal_stage);
  const int64_t per_task = std::min(kRowsOfTile, std::max(kFewestRows, rows * args.passes / (4 * threads)));
  const std::vector<Share> shares = shares_of(starts, per_task);
  const int64_t tasks = static_cast<int64_t>(shares.size()) * args.passes;
  const int64_t tiles = std::min<int64_t>(threads, rows * args.passes / kFewestRows) / args.passes;
  if (tasks < 2 * threads && tiles * args.passes > 1) {
    run_in_step(args, threads, std::max<int64_t>(tiles, 1), kernel);
  } else {
    run_whole(args, threads, shares, kernel);
  }
}

void check_items(const char* op, const Tensor& items, const std::vector<int64_t>& lengths_starts, int64_t table_rows,
                 int64_t window) {
  const int64_t width = items.size(1);
  FASTDIFF_CHECK(window >= 1, op, ": window must be at least 1 (got ", window, ")");
  for (int64_t user = 0; user < items.size(0); user++) {
    const int64_t n = lengths_starts[user + 1] - lengths_starts[user];
    FASTDIFF_CHECK(n <= width, op, ": lengths must be at most the width of items, ", width, " (got ", n, ")");
    FASTDIFF_CHECK(n <= window, op, ": lengths must be at most the window, ", window, " (got ", n, ")");
    for (int64_t i = 0; i < n; i++) {
      const int64_t item = data<int64_t>(items)[user * width + i];
      FASTDIFF_CHECK(item >= 0 && item < table_rows, op, ": items must be rows of the table of ", table_rows, " (got ",
                     item, ")");
    }
  }
}

std::tuple<Tensor, Tensor> encode_causal_history(const Tensor& items, const Tensor& lengths, const Tensor& item_table,
                                                 const Tensor& norm_weight, const Tensor& norm_bias, double norm_eps,
                                                 const std::vector<Tensor>& blocks, int64_t hidden, int64_t heads,
                                                 double eps, const Tensor& pads, const Tensor& pad_output,
                                                 int64_t window, bool only_last) {
  constexpr const char* op = "encode_causal_history";
  const HistoryTensors given(op, items, lengths, item_table);
  const int64_t users = given.users, dim = given.dim;
  const BlockShape shape = block_shape(op, dim, hidden, heads, eps);
  const PackedBlocks packed(op, blocks, shape);
  FASTDIFF_CHECK(packed.size() > 0, op, ": blocks must not be empty");
  const Tensor norm_by = floats(op, "norm_weight", norm_weight, {shape.step()});
  const Tensor norm_plus = floats(op, "norm_bias", norm_bias, {shape.step()});
  const Tensor pad_keys = floats(op, "pads", pads, {packed.size(), 1, 2 * dim});
  const Tensor pad_last = floats(op, "pad_output", pad_output, {1, dim});
  const std::vector<int64_t> starts = starts_of(op, given.lengths);
  check_items(op, given.items, starts, given.table_rows, window);
  std::vector<float> log_pads(users);
  for (int64_t i = 0; i < users; i++) log_pads[i] = std::log(static_cast<float>(window - (starts[i + 1] - starts[i])));

  Tensor rows = empty_like_with(given.table, {only_last ? 0 : starts.back(), dim}, ScalarType::Float);
  Tensor last = empty_like_with(given.table, {users, dim}, ScalarType::Float);
  for (int64_t user = 0; user < users; user++) {
    if (starts[user] == starts[user + 1]) {
      std::copy_n(data<float>(pad_last), dim, mutable_data<float>(last) + user * dim);
    }
  }
  CausalHistoryArgs args{};
  args.shape = shape, args.blocks = packed.pointers.data(), args.n_blocks = static_cast<int>(packed.size());
  args.passes = 1, args.users = users, args.starts = starts.data();
  args.pads = data<float>(pad_keys), args.pad_passes = 1, args.log_pads = log_pads.data();
  args.items = data<int64_t>(given.items), args.items_step = given.places, args.item_table = data<float>(given.table);
  args.norm_weight = data<float>(norm_by), args.norm_bias = data<float>(norm_plus);
  args.norm_eps = static_cast<float>(norm_eps);
  args.rows = only_last ? nullptr : mutable_data<float>(rows);
  args.last = mutable_data<float>(last);
  run(args, starts);
  return {rows, last};
}

std::tuple<Tensor, Tensor, Tensor> prepare_causal_prefix(const Tensor& condition, const Tensor& items,
                                                         const Tensor& lengths, const Tensor& item_table,
                                                         double input_scale, bool normalize, const Tensor& time,
                                                         const std::vector<Tensor>& blocks, int64_t hidden,
                                                         int64_t heads, double eps, const Tensor& pads, int64_t window,
                                                         bool guided) {
  constexpr const char* op = "prepare_causal_prefix";
  const HistoryTensors given(op, items, lengths, item_table);
  const int64_t users = given.users, dim = given.dim, passes = guided ? 2 : 1;
  const BlockShape shape = block_shape(op, dim, hidden, heads, eps);
  const PackedBlocks packed(op, blocks, shape);
  FASTDIFF_CHECK(packed.size() > 0, op, ": blocks must not be empty");
  const Tensor pad_keys = floats(op, "pads", pads, {packed.size(), 2, 2 * dim});
  const Tensor clean = floats(op, "time", time, {dim});
  const std::vector<int64_t> condition_starts = starts_of(op, given.lengths);
  const Tensor conditions = floats(op, "condition", condition, {condition_starts.back(), dim});
  check_items(op, given.items, condition_starts, given.table_rows, window);

  Tensor slots = empty_like_with(given.lengths, {users}, ScalarType::Long);
  Tensor log_pads = empty_like_with(given.table, {users}, ScalarType::Float);
  std::vector<int64_t> starts(users + 1, 0);
  for (int64_t user = 0; user < users; user++) {
    const int64_t n = condition_starts[user + 1] - condition_starts[user];
    mutable_data<int64_t>(slots)[user] = std::max<int64_t>(n - 1, 0);
    // an empty history's last slot is one of its pads, and the prefix holds the others
    mutable_data<float>(log_pads)[user] = std::log(static_cast<float>(window - std::max<int64_t>(n, 1)));
    starts[user + 1] = starts[user] + std::max<int64_t>(n - 1, 0);
  }
  Tensor keys_values = empty_like_with(given.table, {packed.size(), passes, starts.back(), 2 * dim}, ScalarType::Float);

  CausalHistoryArgs args{};
  args.shape = shape, args.blocks = packed.pointers.data(), args.n_blocks = static_cast<int>(packed.size());
  args.passes = static_cast<int>(passes), args.users = users, args.starts = starts.data();
  args.pads = data<float>(pad_keys), args.pad_passes = 2, args.log_pads = data<float>(log_pads);
  args.items = data<int64_t>(given.items), args.items_step = given.places, args.item_shift = 1;
  args.item_table = data<float>(given.table);
  args.condition = data<float>(conditions), args.condition_starts = condition_starts.data();
  args.time = data<float>(clean), args.input_scale = static_cast<float>(input_scale), args.normalize = normalize;
  args.keys_values = mutable_data<float>(keys_values);
  run(args, starts);
  return {keys_values, slots, log_pads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("encode_causal_history", TORCH_BOX(&encode_causal_history));
  m.impl("prepare_causal_prefix", TORCH_BOX(&prepare_causal_prefix));
}

}  // namespace fastdiff
