// One linear layer over rows, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

constexpr int kLinearRows = 24;  // the rows of one call for which scratch is given

struct RowLinearArgs {
  const float* x;       // [rows, n_in]
  const float* weight;  // panels
  const float* bias;    // padded
  int64_t rows;
  int n_in, n_out;
  float* scratch;  // [kLinearRows, padded n_out], where n_out does not fill its panels; else null
  float* y;        // [rows, n_out]
};

FASTDIFF_KERNEL(void, row_linear, (const RowLinearArgs&))

}  // namespace fastdiff
