#include "denoise_attention_loop.h"

#include <atomic>
#include <thread>

#include "../step_noise.h"
#include "scratch.h"
#include "thread_pool.h"
#include "transformer_tensors.h"

namespace fastdiff {

namespace {

// Every task some rows, as many of both for each thread as can be.
void run_tasks(const AttentionLoopArgs& args) {
  const int threads = num_threads();
  const int64_t rows = args.rows, most = rows_per_task(args);
  int64_t tasks = (rows + most - 1) / most;
  if (tasks % threads != 0 && tasks < 8 * threads) tasks = std::min(rows, (tasks / threads + 1) * threads);
  const auto kernel = FASTDIFF_PICK(denoise_attention_loop);
  parallel(threads, tasks, [&](int64_t task) {
    const int64_t first = rows * task / tasks, last = rows * (task + 1) / tasks;
    kernel(args, first, last, scratch(attention_loop_floats(args, first, last)));
  });
}

// All rows by one team, where that is faster; false where it is not.
bool run_team(const AttentionLoopArgs& args) {
  // After a team broke up, the machine being busy, so many calls do without one.
  constexpr int kCallsAlone = 16;
  static std::atomic<int> alone{0};
  const int most = std::min({num_threads(), args.shape.heads, Team::kMost});
  if (most < 2 || args.steps < 2 || passes_of(args, args.rows) > kTeamPasses) return false;
  if (alone.load(std::memory_order_relaxed) > 0) {
    alone.fetch_sub(1, std::memory_order_relaxed);
    return false;
  }
  Team team(meetings_of_step(args), most);
  AttentionLoopShared shared{};
  const auto lead = FASTDIFF_PICK(lead_attention_loop);
  const auto help = FASTDIFF_PICK(help_attention_loop);
  const std::thread::id caller = std::this_thread::get_id();
  bool led = false;  // the caller leads, whichever task it comes to first
  const auto lead_once = [&] {
    if (led) return;
    led = true;
    if (!lead(args, team, shared, scratch(attention_loop_floats(args, 0, args.rows, true)))) {
      alone.store(kCallsAlone, std::memory_order_relaxed);
    }
  };
  const int most_keys = most_keys_of(args, 0, args.users - 1);
  parallel(most, most, [&](int64_t) {
    if (std::this_thread::get_id() == caller) return lead_once();
    help(args, team, shared, scratch(loop_own_floats(args, args.rows, most_keys)));
  });
  lead_once();
  return true;
}

Tensor denoise_attention_loop(const Tensor& x_t, const std::vector<Tensor>& blocks, int64_t hidden, int64_t heads,
                              double eps, const Tensor& cond, const Tensor& keys_values, const Tensor& lengths,
                              const Tensor& pad, const Tensor& log_pads, const MaybeTensor& uniform,
                              double guidance_scale, double input_scale, const Tensor& time, const Tensor& coef,
                              bool normalize, const MaybeTensor& noise, int64_t seed,
                              const MaybeTensor& row_key, const MaybeTensor& sample) {
  constexpr const char* op = "denoise_attention_loop";
  const Tensor fixed = floats(op, "cond", cond, {-1, -1, -1});
  const int64_t branches = fixed.size(0), users = fixed.size(1), dim = fixed.size(2);
  FASTDIFF_CHECK(branches == 1 || branches == 2, op, ": cond must hold one or two passes (got ", branches, ")");
  const Tensor start = floats(op, "x_t", x_t, {-1, dim});
  const int64_t rows = start.size(0);
  FASTDIFF_CHECK(users == 0 ? rows == 0 : rows % users == 0, op,
                 ": x_t must hold the same number of rows for each of the ", users, " users (got ", rows, ")");
  const BlockShape shape = block_shape(op, dim, hidden, heads, eps);
  const PackedBlocks packed(op, blocks, shape);
  const Tensor of_users = checked(op, "lengths", lengths, ScalarType::Long, {users});
  const std::vector<int64_t> starts = starts_of(op, of_users);
  const Tensor cache = floats(op, "keys_values", keys_values, {packed.size(), branches, starts.back(), 2 * dim});
  const Tensor pads = floats(op, "pad", pad, {packed.size(), branches, 2 * dim});
  const Tensor counts = floats(op, "log_pads", log_pads, {users});
  const Tensor times = floats(op, "time", time, {-1, dim});
  const int64_t steps = times.size(0);
  const Tensor table = checked(op, "coef", coef, ScalarType::Double, {steps, 3});
  MaybeTensor even;
  if (uniform.has_value()) even = checked(op, "uniform", *uniform, ScalarType::Bool, {users});
  const StepNoise draws(op, noise, row_key, sample, rows, dim);
  draws.check_steps(steps, [&](int64_t i) { return data<double>(table)[3 * i + 2]; });
  Tensor x_0 = empty_like_with(start, {rows, dim}, ScalarType::Float);
  if (rows == 0) return x_0;

  AttentionLoopArgs args{};
  args.shape = shape;
  args.blocks = packed.pointers.data();
  args.n_blocks = static_cast<int>(packed.size());
  args.branches = static_cast<int>(branches);
  args.rows = rows, args.users = users, args.samples = rows / users;
  args.steps = static_cast<int>(steps);
  args.x_t = data<float>(start), args.x_0 = mutable_data<float>(x_0);
  args.cond = data<float>(fixed), args.keys_values = data<float>(cache), args.starts = starts.data();
  args.pad = data<float>(pads), args.log_pads = data<float>(counts);
  args.uniform = even.has_value() ? data<bool>(*even) : nullptr;
  args.time = data<float>(times), args.coef = data<double>(table);
  args.noise = draws.given(), args.row_key = draws.row_key(), args.sample = draws.sample();
  args.seed = static_cast<uint64_t>(seed);
  args.guidance_scale = static_cast<float>(guidance_scale), args.input_scale = static_cast<float>(input_scale);
  args.normalize = normalize;

  if (!run_team(args)) run_tasks(args);
  return x_0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("denoise_attention_loop", TORCH_BOX(&denoise_attention_loop)); }

}  // namespace fastdiff
