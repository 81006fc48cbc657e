// levels: baseline avx2 avx512
#include "sampler_step.h"
#include "sampler_update.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

void sampler_step(const SamplerStepArgs& args) {
  for (int64_t row = 0; row < args.rows; row++) {
    const int64_t at = row * args.dim;
    update_row(args.model_output + at, args.x_t + at, args.noise == nullptr ? nullptr : args.noise + at,
               args.x_prev + at, static_cast<int>(args.dim), args.c_out, args.c_xt, args.c_noise, args.normalize);
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
