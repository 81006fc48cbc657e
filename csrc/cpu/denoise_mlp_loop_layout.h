// How much scratch the loop takes and where its parts lie: the wrapper and the kernels agree through this file.
#pragma once

#include <cstdint>

namespace fastdiff {
namespace {  // each file has its own copy, compiled for its own instruction set

// Numbers of floats, and the places of the parts in the scratch.
struct MlpLayout {
  int64_t dim, wide, normals;  // row lengths: of the state, of the widest layer, of a row of normals
  int64_t ahead;               // steps whose normals are made at once
  int64_t state, cond, uncond, hidden, other, noise, total;
};

// A denoiser of one layer and no norm: guidance of its outputs is guidance of its conditions.
inline bool mlp_is_linear(int layers, float norm_eps) { return layers == 0 && norm_eps < 0.0f; }

constexpr int64_t mlp_padded(int64_t n) { return (n + 15) / 16 * 16; }
constexpr int64_t mlp_split(int64_t dim) { return dim / 2; }

inline MlpLayout mlp_layout(const int64_t* widths, int layers, int64_t rows, bool guided, int64_t steps,
                            int64_t normals_ahead) {
  MlpLayout at;
  at.dim = mlp_padded(widths[0]);
  at.wide = 0;
  for (int i = 1; i <= layers + 1; i++) at.wide = at.wide < mlp_padded(widths[i]) ? mlp_padded(widths[i]) : at.wide;
  at.normals = (widths[0] + 63) / 64 * 64;
  at.ahead = normals_ahead / (rows * at.normals);
  at.ahead = at.ahead > steps ? steps : at.ahead;
  at.ahead = at.ahead < 1 ? 1 : at.ahead;
  const int64_t branches = guided ? 2 : 1;
  at.state = 0;
  at.cond = at.state + rows * at.dim;
  at.uncond = at.cond + rows * at.wide;
  at.hidden = at.uncond + (guided ? rows * at.wide : 0);
  at.other = at.hidden + branches * rows * at.wide;
  at.noise = at.other + branches * rows * at.wide;
  at.total = at.noise + at.ahead * rows * at.normals;
  return at;
}

}  // namespace
}  // namespace fastdiff
