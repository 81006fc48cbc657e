#include "encode_padded_history.h"

#include "../history_tensors.h"
#include "packed_layers.h"
#include "scratch.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor encode_padded_history(const Tensor& items, const Tensor& lengths, const Tensor& item_table,
                             const Tensor& positions, const Tensor& norm_weight, const Tensor& norm_bias,
                             const std::vector<Tensor>& blocks, int64_t hidden, int64_t heads, bool gelu, double eps,
                             int64_t pad_id, const Tensor& empty) {
  constexpr const char* op = "encode_padded_history";
  const HistoryTensors given(op, items, lengths, item_table);
  const int64_t users = given.users, width = given.places, dim = given.dim;
  FASTDIFF_CHECK(heads >= 1 && dim >= 1 && dim % heads == 0 && dim <= (1 << 16), op,
                 ": dim must be a multiple of heads (got ", dim, " and ", heads, ")");
  FASTDIFF_CHECK(hidden >= 1 && hidden <= (1 << 18), op, ": hidden must be in 1 .. 2^18 (got ", hidden, ")");
  FASTDIFF_CHECK(!blocks.empty(), op, ": blocks must hold at least one");
  const Tensor slots = floats(op, "positions", positions, {-1, dim});
  const int64_t window = slots.size(0), step = padded(static_cast<int>(dim)), per_head = dim / heads;
  const Tensor weight = floats(op, "norm_weight", norm_weight, {step}),
               bias = floats(op, "norm_bias", norm_bias, {step});
  const Tensor nobody = floats(op, "empty", empty, {1, dim});
  std::vector<Tensor> buffers;
  std::vector<const float*> pointers;
  for (size_t i = 0; i < blocks.size(); i++) {
    const int64_t rest = packed_layer(dim, dim) + packed_layer(dim, hidden) + packed_layer(hidden, dim) + 4 * step;
    const int64_t last =
        packed_layer(dim, dim) + heads * (packed_layer(per_head, dim, false) + packed_layer(dim, per_head));
    const int64_t wanted = rest + (i + 1 == blocks.size() ? last : packed_layer(dim, 3 * dim));
    buffers.push_back(floats(op, "blocks", blocks[i], {wanted}));
    pointers.push_back(data<float>(buffers.back()));
  }
  for (int64_t user = 0; user < users; user++) {
    const int64_t length = data<int64_t>(given.lengths)[user];
    FASTDIFF_CHECK(length >= 0 && length <= width && length <= window, op, ": lengths must be in 0..",
                   std::min(width, window), " (got ", length, ")");
    for (int64_t i = 0; i < length; i++) {
      const int64_t item = data<int64_t>(given.items)[user * width + i];
      FASTDIFF_CHECK(item >= 0 && item < given.table_rows, op, ": items must be rows 0..", given.table_rows - 1, " (got ",
                     item, ")");
    }
  }
  Tensor context = empty_like_with(given.table, {users, dim}, ScalarType::Float);

  PaddedHistoryArgs args{};
  args.items = data<int64_t>(given.items), args.lengths = data<int64_t>(given.lengths);
  args.width = static_cast<int>(width), args.window = static_cast<int>(window), args.pad_id = pad_id;
  args.table = data<float>(given.table), args.positions = data<float>(slots);
  args.norm_weight = data<float>(weight), args.norm_bias = data<float>(bias);
  args.blocks = pointers.data(), args.n_blocks = static_cast<int>(pointers.size());
  args.dim = static_cast<int>(dim), args.hidden = static_cast<int>(hidden), args.heads = static_cast<int>(heads);
  args.gelu = gelu, args.eps = static_cast<float>(eps);
  args.empty = data<float>(nobody), args.context = mutable_data<float>(context);

  const int threads = num_threads();
  int64_t tasks = (users + kPaddedUsers - 1) / kPaddedUsers;
  if (tasks % threads != 0 && tasks < 8 * threads) tasks = std::min(users, (tasks / threads + 1) * threads);
  const auto kernel = FASTDIFF_PICK(encode_padded_history);
  parallel(threads, tasks, [&](int64_t task) {
    const int64_t first = users * task / tasks, last = users * (task + 1) / tasks;
    int64_t total = 0, longest = 1;
    for (int64_t user = first; user < last; user++) {
      total += args.lengths[user];
      longest = std::max(longest, args.lengths[user]);
    }
    kernel(args, first, last, scratch(padded_history_floats(args, total, static_cast<int>(longest))));
  });
  return context;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("encode_padded_history", TORCH_BOX(&encode_padded_history)); }

}  // namespace fastdiff
