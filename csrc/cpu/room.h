// The parts of a task's scratch, one behind the other.
#pragma once

#include "linear.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {

struct Room {
  float* at;  // on a whole panel

  FASTDIFF_INLINE float* take(int64_t floats) {
    float* const here = at;
    at += (floats + kPanel - 1) / kPanel * kPanel;
    return here;
  }
};

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
