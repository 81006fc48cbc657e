// levels: baseline avx2 avx512
#include "denoise_attention_loop.h"

#include "attention.h"
#include "philox.h"
#include "room.h"
#include "sampler_update.h"
#include "transformer.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

// Rows that are computed together, and what stands for them from step to step.
struct Rows {
  int64_t first_row, first_user, last_user;
  int rows, passes, most_keys;
  float* cache;  // the keys and values of each layer, branch and user, the pad in front
  float* bias;   // [users, padded(most_keys)]

  Rows(const AttentionLoopArgs& args, int64_t first_row, int64_t last_row)
      : first_row(first_row),
        first_user(first_row / args.samples),
        last_user((last_row - 1) / args.samples),
        rows(static_cast<int>(last_row - first_row)),
        passes(passes_of(args, rows)),
        most_keys(most_keys_of(args, first_user, last_user)) {}
};

// What one step is computed in: of each thread, and of all that compute it.
struct Work {
  float *h, *qkv, *attend;   // own
  float *gathered, *finish;  // shared

  Work(const AttentionLoopArgs& args, const Rows& of, float* own, float* shared) {
    Room parts{own};
    h = parts.take(static_cast<int64_t>(of.passes) * args.shape.step());
    qkv = parts.take(static_cast<int64_t>(of.passes) * args.shape.qkv_step());
    attend = parts.take(attend_floats(args.shape.heads, of.most_keys));
    gathered = shared;
    finish = shared + static_cast<int64_t>(of.passes) * args.shape.step();
  }
};

struct Member {
  Team& team;
  int member, count;
  FASTDIFF_INLINE bool meet() const { return team.meet(member, count); }
};

// The keys and values of one user at `at`, which moves behind them.
KeyValues next_keys(const AttentionLoopArgs& args, int n_keys, float*& at) {
  const int heads = args.shape.heads, width = args.shape.dim / heads;
  Room room{at};
  float* const keys = room.take(key_floats(heads, width, n_keys));
  float* const values = room.take(value_floats(heads, width, n_keys));
  at = room.at;
  return {keys, values, heads, width, n_keys};
}

// Writes the cache, then the bias behind it, from of.cache on; returns what follows.
float* put_users(const AttentionLoopArgs& args, Rows& of) {
  const int dim = args.shape.dim;
  float* at = of.cache;
  for (int layer = 0; layer < args.n_blocks; layer++) {
    for (int branch = 0; branch < args.branches; branch++) {
      const int64_t pass = static_cast<int64_t>(layer) * args.branches + branch;
      const float* pad = args.pad + pass * 2 * dim;
      for (int64_t user = of.first_user; user <= of.last_user; user++) {
        const int n_keys = args.keys_of(user);
        const KeyValues cached = next_keys(args, n_keys, at);
        clear_keys(cached, n_keys);
        put_keys(cached, 0, 1, pad, pad + dim, 0);
        const float* row = args.keys_values + (pass * args.slots() + args.starts[user]) * 2 * dim;
        put_keys(cached, 1, n_keys - 1, row, row + dim, 2 * dim);
      }
    }
  }
  of.bias = at;
  for (int64_t user = of.first_user; user <= of.last_user; user++, at += padded(of.most_keys)) {
    for (int i = 0; i < padded(of.most_keys); i++) at[i] = 0.0f;
    at[0] = args.log_pads[user];
  }
  return at;
}

// Attention of all passes, heads first .. last - 1.
void attend_heads(const AttentionLoopArgs& args, const Rows& of, const Work& work, float*& at, int first, int last) {
  const int dim = args.shape.dim, step = args.shape.step(), qkv_step = args.shape.qkv_step();
  const int from = first * (dim / args.shape.heads);
  for (int branch = 0; branch < args.branches; branch++) {
    int row = 0;
    for (int64_t user = of.first_user; user <= of.last_user; user++) {
      const int n_keys = args.keys_of(user);
      const KeyValues cached = next_keys(args, n_keys, at).some(first, last);
      const bool even = args.uniform != nullptr && args.uniform[user];
      const float* bias = of.bias + (user - of.first_user) * padded(of.most_keys);
      for (; row < of.rows && (of.first_row + row) / args.samples == user; row++) {
        const int pass = branch * of.rows + row;
        const float* projected = work.qkv + pass * qkv_step + from;
        attend(cached, projected, even, bias, n_keys, projected + dim, projected + 2 * dim,
               work.gathered + pass * step + from, work.attend);
      }
    }
  }
}

// The blocks' output for rows x of step i, in work.h; false where this part of a team is not to have it: see Team::meet.
template <class Part>
bool run_step(const AttentionLoopArgs& args, const Rows& of, const Work& work, int i, const float* x, Part part) {
  const BlockShape& shape = args.shape;
  const int dim = shape.dim, width = dim / shape.heads, step = shape.step(), qkv_step = shape.qkv_step();
  const float* time = args.time + static_cast<int64_t>(i) * dim;
  for (int pass = 0; pass < of.passes; pass++) {
    const int branch = pass / of.rows, row = pass % of.rows;
    const float* cond = args.cond + (branch * args.users + (of.first_row + row) / args.samples) * dim;
    for (int d = 0; d < dim; d++) {
      work.h[pass * step + d] = (cond[d] + time[d]) + args.input_scale * x[row * step + d];
    }
  }
  const int first = part_begin(part, shape.heads), last = part_end(part, shape.heads);
  float* at = of.cache;
  for (int layer = 0; layer < args.n_blocks; layer++) {
    const Block block(args.blocks[layer], shape);
    if (part.count == 1) {
      linear_spread(block.qkv, work.h, step, of.passes, work.qkv, qkv_step);
    } else {  // queries, keys and values of the part's own heads: whole panels, of which some may be another's too
      for (int from = 0; from < 3 * dim; from += dim) {
        linear_spread(block.qkv, work.h, step, of.passes, work.qkv, qkv_step, (from + first * width) / kPanel,
                      padded(from + last * width) / kPanel);
      }
    }
    attend_heads(args, of, work, at, first, last);
    if (!part.meet()) return false;
    if (!finish_block(block, work.h, work.gathered, of.passes, work.finish, part)) return false;
  }
  return true;
}

// The sampler's update of rows x by the blocks' output.
void update(const AttentionLoopArgs& args, const Rows& of, const PhiloxKeys& philox, int i, float* h, float* draw,
            float* x) {
  const int dim = args.shape.dim, step = args.shape.step();
  if (args.branches == 2) {  // u + g (c - u)
    for (int row = 0; row < of.rows; row++) {
      const float* uncond = h + (of.rows + row) * step;
      float* cond = h + row * step;
      for (int d = 0; d < dim; d++) cond[d] = uncond[d] + args.guidance_scale * (cond[d] - uncond[d]);
    }
  }
  const float c_out = static_cast<float>(args.coef[3 * i]), c_xt = static_cast<float>(args.coef[3 * i + 1]);
  const float c_noise = static_cast<float>(args.coef[3 * i + 2]);
  if (c_noise != 0.0f && args.row_key != nullptr) {
    fill_normals(philox, args.row_key + of.first_row, args.sample + of.first_row, of.rows, static_cast<uint32_t>(1 + i),
                 1, 0, dim, draw, padded_normals(dim));
  }
  for (int row = 0; row < of.rows; row++) {
    const float* noise = draw + row * padded_normals(dim);
    if (c_noise != 0.0f && args.row_key == nullptr) {
      noise = args.noise + (static_cast<int64_t>(i) * args.rows + of.first_row + row) * dim;
    }
    update_row(h + row * step, x + row * step, noise, x + row * step, dim, c_out, c_xt, c_noise, args.normalize);
  }
}

void copy_rows(const float* from, int64_t from_step, int rows, int dim, float* to, int64_t to_step) {
  for (int row = 0; row < rows; row++) {
    for (int d = 0; d < dim; d++) to[row * to_step + d] = from[row * from_step + d];
  }
}

// All steps of some rows, by this thread and, where `team` is given, by those that come to help; false if it broke up.
bool run_rows(const AttentionLoopArgs& args, int64_t first_row, int64_t last_row, Team* team,
              AttentionLoopShared* shared, float* room) {
  const int dim = args.shape.dim, step = args.shape.step();
  Rows of(args, first_row, last_row);
  Room parts{room};
  float* x = parts.take(static_cast<int64_t>(of.rows) * step);
  float* const draw = parts.take(static_cast<int64_t>(of.rows) * padded_normals(dim));
  float* const own = parts.take(loop_own_floats(args, of.rows, of.most_keys));
  const Work work(args, of, own, parts.take(loop_shared_floats(args, of.rows)));
  of.cache = team == nullptr ? parts.at : parts.at + of.rows * step + loop_shared_floats(args, of.rows);
  put_users(args, of);
  copy_rows(args.x_t + first_row * dim, dim, of.rows, dim, x, step);
  if (team != nullptr) {
    shared->x = x, shared->cache = of.cache, shared->bias = of.bias;
    shared->work = parts.take(loop_shared_floats(args, of.rows));
  }
  const PhiloxKeys philox = philox_keys(args.seed);
  for (int i = 0; i < args.steps; i++) {
    bool done = false;
    const int count = team == nullptr ? 1 : team->open();
    if (count > 1) done = run_step(args, of, Work(args, of, own, shared->work), i, x, Member{*team, 0, count});
    if (!done) {
      if (count > 1) {  // a member that slept may still look at x
        float* const mine = parts.take(static_cast<int64_t>(of.rows) * step);
        copy_rows(x, step, of.rows, dim, mine, step);
        x = mine;
      }
      run_step(args, of, work, i, x, Alone{});
    }
    update(args, of, philox, i, work.h, draw, x);
  }
  copy_rows(x, step, of.rows, dim, args.x_0 + first_row * dim, dim);
  return team == nullptr || team->end();
}

}  // namespace

void denoise_attention_loop(const AttentionLoopArgs& args, int64_t first_row, int64_t last_row, float* room) {
  run_rows(args, first_row, last_row, nullptr, nullptr, room);
}

bool lead_attention_loop(const AttentionLoopArgs& args, Team& team, AttentionLoopShared& shared, float* room) {
  return run_rows(args, 0, args.rows, &team, &shared, room);
}

void help_attention_loop(const AttentionLoopArgs& args, Team& team, const AttentionLoopShared& shared, float* room) {
  const int member = team.join();
  if (member == 0) return;
  const Rows all(args, 0, args.rows);
  for (int64_t round = 0;;) {
    const int count = team.follow(member, round);
    if (count == 0) return;
    Rows of = all;
    of.cache = shared.cache, of.bias = shared.bias;
    const Work work(args, of, room, shared.work);
    run_step(args, of, work, static_cast<int>(round), shared.x, Member{team, member, count});
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
