// levels: baseline avx2 avx512
#include "row_linear.h"

#include "linear.h"
#include "rows.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

void row_linear(const RowLinearArgs& args) {
  const Linear layer = {args.weight, args.bias, args.n_in, args.n_out};
  const int whole = padded(args.n_out);
  for (int64_t row = 0; row < args.rows; row += kLinearRows) {
    const int rows = static_cast<int>(args.rows - row < kLinearRows ? args.rows - row : kLinearRows);
    float* const y = args.y + row * args.n_out;
    if (args.scratch == nullptr) {
      linear(layer, args.x + row * args.n_in, args.n_in, rows, y, args.n_out);
      continue;
    }
    linear(layer, args.x + row * args.n_in, args.n_in, rows, args.scratch, whole);
    for (int i = 0; i < rows; i++) unpad_row(args.scratch + i * whole, y + static_cast<int64_t>(i) * args.n_out, args.n_out);
  }
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
