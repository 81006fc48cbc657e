// levels: baseline avx2 avx512
#include "sample_affine.h"

#include "linear.h"
#include "philox.h"
#include "rows.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

void sample_affine(const SampleAffineArgs& args) {
  const int dim = args.dim, whole = padded(dim);
  const int64_t panels = static_cast<int64_t>(whole) * dim;
  const Linear gain = {args.weights, args.weights + panels, dim, dim};
  const Linear factor = {args.weights + panels + whole, nullptr, dim, dim};
  const float* z = args.z;
  int64_t z_step = dim;
  float* const normals = args.scratch;
  float* const padded_x = normals + kAffineRows * static_cast<int64_t>(padded_normals(dim));
  float* const guided = padded_x + kAffineRows * static_cast<int64_t>(whole);
  float* const x = whole == dim ? args.x_0 : padded_x;
  for (int row = 0; args.uncond != nullptr && row < args.rows; row++) {
    guide_row(args.cond + static_cast<int64_t>(row) * dim, args.uncond + row * args.uncond_step, args.guidance_scale,
              dim, guided + row * whole, whole);
  }
  if (z == nullptr) {
    z_step = padded_normals(dim);
    fill_normals(philox_keys(args.seed), args.row_key, args.sample, args.rows, 0, 1, 0, dim, normals, z_step);
    z = normals;
  }
  if (args.uncond != nullptr) {
    linear(gain, guided, whole, args.rows, x, whole);
  } else {
    linear(gain, args.cond, dim, args.rows, x, whole);
  }
  linear(factor, z, z_step, args.rows, x, whole, true);
  if (whole == dim) return;
  for (int row = 0; row < args.rows; row++) unpad_row(x + row * whole, args.x_0 + static_cast<int64_t>(row) * dim, dim);
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
