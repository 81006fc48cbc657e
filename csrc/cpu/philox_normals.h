// Normal draws of rows, on plain pointers.
#pragma once

#include <cstdint>

#include "levels.h"

namespace fastdiff {

struct PhiloxNormalsArgs {
  uint64_t seed;
  const int64_t* row_key;  // [rows]
  const int64_t* sample;   // [rows]
  uint32_t draw;
  int64_t rows;
  int dim;
  float* normals;  // [rows, dim]
};

FASTDIFF_KERNEL(void, philox_normals, (const PhiloxNormalsArgs&))

}  // namespace fastdiff
