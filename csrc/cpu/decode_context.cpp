#include "decode_context.h"

#include "../step_noise.h"
#include "../tensors.h"
#include "packed_layers.h"
#include "scratch.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor decode_context(const Tensor& context, const Tensor& weights, int64_t heads, bool coupled, bool gelu, double eps,
                      const Tensor& cross, const Tensor& coef, bool normalize, int64_t num_samples,
                      const MaybeTensor& x_t, int64_t first_draw, const MaybeTensor& noise, int64_t seed,
                      const MaybeTensor& row_key, const MaybeTensor& sample) {
  constexpr const char* op = "decode_context";
  const Tensor contexts = floats(op, "context", context, {-1, -1});
  const int64_t users = contexts.size(0), dim = contexts.size(1);
  FASTDIFF_CHECK(heads >= 1 && dim >= 1 && dim % heads == 0 && dim <= (1 << 16), op,
                 ": dim must be a multiple of heads (got ", dim, " and ", heads, ")");
  FASTDIFF_CHECK(num_samples >= 1 && num_samples < (1 << 24), op, ": num_samples must be in 1 .. 2^24 - 1 (got ",
                 num_samples, ")");
  FASTDIFF_CHECK(!coupled || users < (1 << 24), op, ": a coupled batch must hold less than 2^24 users (got ", users,
                 ")");
  const int64_t rows = users * num_samples, step = padded(static_cast<int>(dim));
  const int64_t wanted = packed_layer(dim, coupled ? 3 * dim : dim) + 3 * packed_layer(dim, dim) + 6 * step;
  const Tensor packed = floats(op, "weights", weights, {wanted});
  const Tensor memory = floats(op, "cross", cross, {-1, dim});
  const int64_t steps = memory.size(0);
  const Tensor table = checked(op, "coef", coef, ScalarType::Double, {steps, 3});
  FASTDIFF_CHECK(steps >= 1, op, ": coef must hold at least one step");
  MaybeTensor start;
  if (x_t.has_value()) start = floats(op, "x_t", *x_t, {rows, dim});
  FASTDIFF_CHECK(start.has_value() || data<double>(table)[1] == 0.0, op, ": x_t must be given where step 0 reads it");
  const StepNoise draws(op, noise, row_key, sample, rows, dim);
  draws.check_steps(steps, [&](int64_t i) { return data<double>(table)[3 * i + 2]; });
  Tensor x_0 = empty_like_with(contexts, {rows, dim}, ScalarType::Float);
  if (rows == 0) return x_0;

  ContextArgs args{};
  args.weights = data<float>(packed);
  args.dim = static_cast<int>(dim), args.heads = static_cast<int>(heads);
  args.coupled = coupled, args.gelu = gelu, args.eps = static_cast<float>(eps);
  args.users = users, args.samples = num_samples;
  args.context = data<float>(contexts);
  args.cross = data<float>(memory), args.coef = data<double>(table), args.steps = static_cast<int>(steps);
  args.normalize = normalize;
  args.x_t = start.has_value() ? data<float>(*start) : nullptr;
  args.noise = draws.given(), args.row_key = draws.row_key(), args.sample = draws.sample();
  args.seed = static_cast<uint64_t>(seed), args.first_draw = first_draw;
  args.x_0 = mutable_data<float>(x_0);

  const int threads = num_threads();
  int64_t tasks = (users + kContextUsers - 1) / kContextUsers;
  if (tasks % threads != 0 && tasks < 8 * threads) tasks = std::min(users, (tasks / threads + 1) * threads);
  const auto first_of = [&](int64_t task) { return users * task / tasks; };
  MaybeTensor queries, key_panels, value_panels;
  if (coupled) {
    const KeyPanels panels = {nullptr, nullptr, args.heads, args.dim / args.heads, static_cast<int>(users)};
    queries = empty_like_with(contexts, {users, padded(3 * args.dim)}, ScalarType::Float);
    key_panels = empty_like_with(contexts, {panels.key_floats()}, ScalarType::Float);
    value_panels = empty_like_with(contexts, {panels.value_floats()}, ScalarType::Float);
    args.queries = mutable_data<float>(*queries);
    args.keys = mutable_data<float>(*key_panels), args.values = mutable_data<float>(*value_panels);
    FASTDIFF_PICK(clear_context)(args);
    const auto project = FASTDIFF_PICK(project_context);
    // a cache line of the key panels holds 16 users: they belong to one task
    parallel(threads, (users + kPanel - 1) / kPanel,
             [&](int64_t task) { project(args, task * kPanel, std::min<int64_t>(users, (task + 1) * kPanel)); });
  }
  const auto kernel = FASTDIFF_PICK(decode_context);
  parallel(threads, tasks,
           [&](int64_t task) { kernel(args, first_of(task), first_of(task + 1), scratch(context_floats(args))); });
  return x_0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("decode_context", TORCH_BOX(&decode_context)); }

}  // namespace fastdiff
