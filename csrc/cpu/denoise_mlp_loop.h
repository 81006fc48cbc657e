// All steps of a sampler whose denoiser is an MLP, for one block of rows, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

enum MlpActivation : int { kGelu = 0, kRelu, kSilu, kTanh };

constexpr int kMlpRows = 12;        // the most rows of one call: their state stays in a core's first cache
constexpr int kMlpLayers = 8;       // the most layers after the first
constexpr int kMlpNoise = 1 << 12;  // normals made ahead, about: 16 KB

// A network is one buffer. Its first kMlpHeader floats say what it is: how many layers follow the first one, the
// activation, the eps of the norm after the last layer (below 0 where there is none), and the widths. Then come the
// first layer's panels for the inputs x_t[: split], and for the rest (split: half of dim, see mlp_split), of each further
// layer its panels and its bias, and the weight and bias of the norm.
constexpr int kMlpHeader = 16;

struct MlpShape {
  int64_t widths[kMlpLayers + 2];  // dim, the first layer's outputs, .., dim
  int layers;                      // after the first
  int activation;
  float norm_eps;
};

// What a step reads of its row of the table `steps`, kMlpFactors floats in front of the padded time.
enum MlpFactor : int { kFactorOut = 0, kFactorState, kFactorNoise, kSphereBefore, kSphereAfter, kMlpFactors = 16 };

struct MlpLoopArgs {
  MlpShape shape;
  const float* weights;  // of the network, behind its header

  const float* x_t;        // [rows, dim], or null: draw 0
  const float* cond;       // [rows, H]
  const float* uncond;     // rows uncond_step apart, or null: guidance is off
  int64_t uncond_step;     // H, or 0: one for all
  float guidance_scale;
  const float* table;  // [steps, kMlpFactors + padded H]: the factors by MlpFactor, then the time
  int64_t steps;

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
