// levels: baseline avx2 avx512
#include "denoise_attention_loop.h"

#include "attention.h"
#include "philox.h"
#include "sampler_update.h"
#include "transformer.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

// The parts of a task's room, in the order in which attention_loop_floats counts them.
struct Room {
  float* at;
  float* take(int64_t floats) {
    float* here = at;
    at += (floats + kPanel - 1) / kPanel * kPanel;
    return here;
  }
};

}  // namespace

void denoise_attention_loop(const AttentionLoopArgs& args, int64_t first_row, int64_t last_row, float* room) {
  const BlockShape& shape = args.shape;
  const int dim = shape.dim, width = dim / shape.heads, step = shape.step(), qkv_step = shape.qkv_step();
  const int rows = static_cast<int>(last_row - first_row), passes = rows * args.branches;
  const int64_t first_user = first_row / args.samples, last_user = (last_row - 1) / args.samples;
  const int users = static_cast<int>(last_user - first_user) + 1;

  int most_keys = 0;
  for (int64_t user = first_user; user <= last_user; user++) {
    most_keys = args.keys_of(user) > most_keys ? args.keys_of(user) : most_keys;
  }
  Room parts{room};
  float* const x = parts.take(static_cast<int64_t>(rows) * step);
  float* const h = parts.take(static_cast<int64_t>(passes) * step);
  float* const gathered = parts.take(static_cast<int64_t>(passes) * step);
  float* const qkv = parts.take(static_cast<int64_t>(passes) * qkv_step);
  float* const finish_room = parts.take(finish_floats(shape, passes));
  float* const attend_room = parts.take(attend_floats(shape.heads, most_keys));
  float* const draw = parts.take(static_cast<int64_t>(rows) * padded_normals(dim));
  float* const bias = parts.take(static_cast<int64_t>(users) * padded(most_keys));

  // the keys and values of each layer, branch and user, the pad in front
  float* const cache = parts.at;
  for (int layer = 0; layer < args.n_blocks; layer++) {
    for (int branch = 0; branch < args.branches; branch++) {
      const int64_t pass = static_cast<int64_t>(layer) * args.branches + branch;
      const float* pad = args.pad + pass * 2 * dim;
      for (int64_t user = first_user; user <= last_user; user++) {
        const int n_keys = args.keys_of(user);
        float* const keys = parts.take(key_floats(shape.heads, width, n_keys));
        float* const values = parts.take(value_floats(shape.heads, width, n_keys));
        const KeyValues cached = {keys, values, shape.heads, width, n_keys};
        clear_keys(cached, n_keys);
        put_keys(cached, 0, 1, pad, pad + dim, 0);
        const float* row = args.keys_values + (pass * args.slots() + args.starts[user]) * 2 * dim;
        put_keys(cached, 1, n_keys - 1, row, row + dim, 2 * dim);
      }
    }
  }
  for (int user = 0; user < users; user++) {
    float* of_user = bias + static_cast<int64_t>(user) * padded(most_keys);
    for (int at = 0; at < padded(most_keys); at++) of_user[at] = 0.0f;
    of_user[0] = args.log_pads[first_user + user];
  }
  for (int row = 0; row < rows; row++) {
    for (int d = 0; d < dim; d++) x[row * step + d] = args.x_t[(first_row + row) * dim + d];
  }

  const PhiloxKeys philox = philox_keys(args.seed);
  for (int i = 0; i < args.steps; i++) {
    const float* time = args.time + static_cast<int64_t>(i) * dim;
    for (int pass = 0; pass < passes; pass++) {
      const int branch = pass / rows, row = pass % rows;
      const float* cond = args.cond + (branch * args.users + (first_row + row) / args.samples) * dim;
      for (int d = 0; d < dim; d++) {
        h[pass * step + d] = (cond[d] + time[d]) + args.input_scale * x[row * step + d];
      }
    }
    float* at = cache;
    for (int layer = 0; layer < args.n_blocks; layer++) {
      const Block block(args.blocks[layer], shape);
      linear_spread(block.qkv, h, step, passes, qkv, qkv_step);
      for (int branch = 0; branch < args.branches; branch++) {
        int row = 0;
        for (int64_t user = first_user; user <= last_user; user++) {
          const int n_keys = args.keys_of(user);
          Room of_user{at};
          float* const keys = of_user.take(key_floats(shape.heads, width, n_keys));
          float* const values = of_user.take(value_floats(shape.heads, width, n_keys));
          at = of_user.at;
          const KeyValues cached = {keys, values, shape.heads, width, n_keys};
          const bool even = args.uniform != nullptr && args.uniform[user];
          const float* of_bias = bias + (user - first_user) * padded(most_keys);
          for (; row < rows && (first_row + row) / args.samples == user; row++) {
            const int pass = branch * rows + row;
            const float* projected = qkv + pass * qkv_step;
            attend(cached, projected, even, of_bias, n_keys, projected + dim, projected + 2 * dim,
                   gathered + pass * step, attend_room);
          }
        }
      }
      finish_block(block, h, gathered, passes, finish_room);
    }
    if (args.branches == 2) {  // u + g (c - u)
      for (int row = 0; row < rows; row++) {
        const float* uncond = h + (rows + row) * step;
        float* cond = h + row * step;
        for (int d = 0; d < dim; d++) cond[d] = uncond[d] + args.guidance_scale * (cond[d] - uncond[d]);
      }
    }
    const float c_out = static_cast<float>(args.coef[3 * i]), c_xt = static_cast<float>(args.coef[3 * i + 1]);
    const float c_noise = static_cast<float>(args.coef[3 * i + 2]);
    if (c_noise != 0.0f && args.row_key != nullptr) {
      fill_normals(philox, args.row_key + first_row, args.sample + first_row, rows, static_cast<uint32_t>(1 + i), 1, 0,
                   dim, draw, padded_normals(dim));
    }
    for (int row = 0; row < rows; row++) {
      const float* noise = draw + row * padded_normals(dim);
      if (c_noise != 0.0f && args.row_key == nullptr) {
        noise = args.noise + (static_cast<int64_t>(i) * args.rows + first_row + row) * dim;
      }
      update_row(h + row * step, x + row * step, noise, x + row * step, dim, c_out, c_xt, c_noise, args.normalize);
    }
  }
  for (int row = 0; row < rows; row++) {
    for (int d = 0; d < dim; d++) args.x_0[(first_row + row) * dim + d] = x[row * step + d];
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
