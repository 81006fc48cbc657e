// levels: baseline avx2 avx512
#include "philox.h"
#include "philox_normals.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

void philox_normals(const PhiloxNormalsArgs& args) {
  const PhiloxKeys keys = philox_keys(args.seed);
  const int whole = args.dim / kNormalsAtOnce * kNormalsAtOnce, rest = args.dim - whole;
  fill_normals(keys, args.row_key, args.sample, static_cast<int>(args.rows), args.draw, 1, 0, whole, args.normals,
               args.dim);
  if (rest == 0) return;
  alignas(64) float made[kCountersAhead * kNormalsAtOnce];
  for (int64_t first = 0; first < args.rows; first += kCountersAhead) {
    const int rows = static_cast<int>(args.rows - first < kCountersAhead ? args.rows - first : kCountersAhead);
    fill_normals(keys, args.row_key + first, args.sample + first, rows, args.draw, 1, whole, args.dim, made,
                 kNormalsAtOnce);
    for (int row = 0; row < rows; row++) {
      float* out = args.normals + (first + row) * args.dim + whole;
      for (int at = 0; at < rest; at += kLanes) {
        store_n(out + at, load(made + row * kNormalsAtOnce + at), rest - at < kLanes ? rest - at : kLanes);
      }
    }
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
