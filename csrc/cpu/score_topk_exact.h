// The definition of score_topk's scores, and the packing of its tables, on plain pointers.
#pragma once

#include "score_topk.h"

namespace fastdiff {

// scores[i] = float32 of ((q_0 e_0 + q_1 e_1) + q_2 e_2) + ... in float64; a zero is +0
FASTDIFF_KERNEL(void, topk_exact, (const topk::ExactArgs&))
FASTDIFF_KERNEL(void, topk_pack, (const topk::PackArgs&))

}  // namespace fastdiff
