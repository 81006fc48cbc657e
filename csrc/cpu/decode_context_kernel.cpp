// levels: baseline avx2 avx512
#include "batch_attention.h"
#include "decode_context.h"
#include "packed_layers.h"
#include "philox.h"
#include "room.h"
#include "sampler_update.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

KeyPanels panels_of(const ContextArgs& args) {
  return {args.keys, args.values, args.heads, args.dim / args.heads, static_cast<int>(args.users)};
}

}  // namespace

void clear_context(const ContextArgs& args) { clear_tails(panels_of(args)); }

void project_context(const ContextArgs& args, int64_t first, int64_t last) {
  const int dim = args.dim, qkv_step = padded(3 * dim);
  Layers layers{args.weights};
  const Linear qkv = layers.layer(dim, 3 * dim);
  float* const of_first = args.queries + first * qkv_step;
  linear_spread(qkv, args.context + first * dim, dim, static_cast<int>(last - first), of_first, qkv_step);
  const KeyPanels panels = panels_of(args);
  for (int64_t user = first; user < last; user++) {
    const float* of_user = args.queries + user * qkv_step;
    put_key(panels, static_cast<int>(user), of_user + dim, of_user + 2 * dim);
  }
}

void decode_context(const ContextArgs& args, int64_t first, int64_t last, float* room) {
  const int dim = args.dim, step = padded(dim), n = static_cast<int>(last - first), qkv_step = padded(3 * dim);
  const int gathered_step = step + kPanel;
  Layers layers{args.weights};
  const Linear in = layers.layer(dim, args.coupled ? 3 * dim : dim);
  const Linear out = layers.layer(dim, dim);
  const Norm norm_1 = layers.norm(dim);
  const Linear linear_1 = layers.layer(dim, dim), linear_2 = layers.layer(dim, dim);
  const Norm norm_2 = layers.norm(dim), norm_3 = layers.norm(dim);

  Room parts{room};
  float* const gathered = parts.take(int64_t{1} * n * gathered_step);
  float* const attended = parts.take(int64_t{1} * n * step);
  float* const x = parts.take(int64_t{1} * n * step);
  float* const hidden_room = parts.take(int64_t{2} * n * step);
  float* const draw = parts.take(padded_normals(dim));
  float* const scores = parts.take(args.coupled ? int64_t{1} * n * padded(static_cast<int>(args.users)) : 0);

  const float* const context = args.context + first * dim;
  if (args.coupled) {
    const int users = static_cast<int>(args.users);
    attend_rows(panels_of(args), args.queries + first * qkv_step, qkv_step, n, users, gathered, gathered_step, scores);
  } else {
    linear_spread(in, context, dim, n, gathered, gathered_step);
  }
  linear_spread(out, gathered, gathered_step, n, attended, step);
  layer_norm_rows(attended, step, context, dim, n, dim, norm_1.weight, norm_1.bias, args.eps, attended, step);

  const PhiloxKeys philox = philox_keys(args.seed);
  for (int i = 0; i < args.steps; i++) {
    layer_norm_rows(attended, step, args.cross + int64_t{1} * i * dim, 0, n, dim, norm_2.weight, norm_2.bias, args.eps,
                    x, step);
    feed_forward(linear_1, linear_2, norm_3, args.gelu, args.eps, x, step, n, hidden_room);
    const float c_out = static_cast<float>(args.coef[3 * i]), c_xt = static_cast<float>(args.coef[3 * i + 1]);
    const float c_noise = static_cast<float>(args.coef[3 * i + 2]);
    for (int64_t row = first * args.samples; row < last * args.samples; row++) {
      const float* output = x + (row / args.samples - first) * step;
      float* const to = args.x_0 + row * dim;
      const float* noise = draw;
      if (c_noise != 0.0f && args.row_key != nullptr) {
        fill_normals(philox, static_cast<uint64_t>(args.row_key[row]), static_cast<uint32_t>(args.sample[row]),
                     static_cast<uint32_t>(args.first_draw + i), 0, dim, draw);
      } else if (c_noise != 0.0f) {
        noise = args.noise + (i * args.users * args.samples + row) * dim;
      }
      update_row(output, i == 0 ? (args.x_t == nullptr ? output : args.x_t + row * dim) : to, noise, to, dim, c_out,
                 c_xt, c_noise, args.normalize);
    }
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
