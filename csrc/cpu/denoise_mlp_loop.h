// All steps of a sampler whose denoiser is an MLP, for one block of rows, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

enum MlpActivation : int { kGelu = 0, kRelu, kSilu, kTanh };

constexpr int kMlpRows = 12;        // the most rows of one call: their state stays in a core's first cache
constexpr int kMlpLayers = 8;       // the most layers after the first
constexpr int kMlpNoise = 1 << 12;  // normals made ahead, about: 16 KB

// `weights` is one buffer: the first layer's panels for the inputs x_t[: split], then for the rest (split: half of dim,
// see mlp_split), then of each further layer its panels and its bias, then the weight and bias of the norm.
struct MlpLoopArgs {
  const float* weights;
  const int64_t* widths;  // [layers + 2]: dim, the first layer's outputs, .., dim
  int layers;             // after the first
  int activation;
  float norm_eps;  // of the norm after the last layer; below 0 where there is none

  const float* x_t;        // [rows, dim], or null: draw 0
  const float* cond;       // [rows, H]
  const float* uncond;     // rows uncond_step apart, or null
  int64_t uncond_step;     // H, or 0: one for all
  float guidance_scale;
  const float* time;   // [steps, H]
  const double* coef;  // [steps, 3]
  int64_t steps;
  bool normalize;

  const float* noise;  // given draws: step i's rows at noise + i * noise_step, dim apart; or null
  int64_t noise_step;
  uint64_t seed;           // otherwise, where row_key is not null
  const int64_t* row_key;  // [rows]
  const int64_t* sample;   // [rows]

  int rows;
  float* scratch;  // mlp_scratch() floats
  float* x_0;      // [rows, dim]
};

FASTDIFF_KERNEL(void, denoise_mlp_loop, (const MlpLoopArgs&))

}  // namespace fastdiff
