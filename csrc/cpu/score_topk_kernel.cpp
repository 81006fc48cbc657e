// levels: baseline avx2 avx512 avx512_vnni avx512_bf16 amx
#include "score_topk_tiles.h"
#include "score_topk_vectors.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

void topk_scan(const topk::ScanArgs& args) {
#if defined(__AMX_TILE__)
  if (args.product == topk::Product::bfloat16_tiles || args.product == topk::Product::int8_tiles) {
    // constant data: GCC 12 believes that the instruction reads 8 bytes, and leaves out the writing of the others
    static constexpr TileShapes kShapes;
    _tile_loadconfig(&kShapes);
    TileScan(args).run();
    return _tile_release();
  }
#endif
  VectorScan(args).run();
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
