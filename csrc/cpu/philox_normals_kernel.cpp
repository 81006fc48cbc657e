// levels: baseline avx2 avx512
#include "philox.h"
#include "philox_normals.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

void philox_normals(const PhiloxNormalsArgs& args) {
  const PhiloxKeys keys = philox_keys(args.seed);
  const int whole = args.dim / kNormalsAtOnce * kNormalsAtOnce;
  for (int64_t row = 0; row < args.rows; row++) {
    const uint64_t row_key = static_cast<uint64_t>(args.row_key[row]);
    const uint32_t sample = static_cast<uint32_t>(args.sample[row]);
    float* out = args.normals + row * args.dim;
    fill_normals(keys, row_key, sample, args.draw, 0, whole, out);
    if (whole == args.dim) continue;
    float rest[kNormalsAtOnce];
    fill_normals(keys, row_key, sample, args.draw, whole, args.dim, rest);
    for (int at = whole; at < args.dim; at += kLanes) {
      const int n = args.dim - at < kLanes ? args.dim - at : kLanes;
      store_n(out + at, load(rest + at - whole), n);
    }
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
