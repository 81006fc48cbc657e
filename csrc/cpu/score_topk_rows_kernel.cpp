// levels: baseline avx2 avx512 avx512_vnni avx512_bf16 amx
#include "dot_rows.h"
#include "score_topk_rows.h"

namespace fastdiff {
namespace FASTDIFF_LEVEL {
namespace {

using namespace topk;

constexpr float kNone = -__builtin_inff();

float slack(const RowsArgs& args, const Bound& bound) {
  const Queries& queries = args.queries;
  return queries.by_residual[args.query] * bound.residual + queries.by_norm[args.query] * bound.norm +
         queries.tiny[args.query];
}

#if defined(__AVX512F__)

// The scores of the 16 rows named, of one block.
FASTDIFF_INLINE __m512 scores_of(const RowsArgs& args, const char* const* rows, const Bound& bound) {
  const int64_t dim = args.table.dim;
  const float* query = args.queries.floats + args.query * dim;
#if defined(__AVX512VNNI__)
  if (args.product == Product::int8) {
    const __m512i sums = dot_rows_int8(rows, args.queries.words + args.query * args.queries.steps, dim);
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(args.queries.zero[args.query])));
    return _mm512_mul_ps(whole, _mm512_set1_ps(args.queries.scale[args.query] * bound.scale));
  }
#endif
  if (args.table.stored == Stored::float32) return dot_rows<float>(rows, query, dim);
  if (args.table.stored == Stored::float16) {
    return _mm512_mul_ps(dot_rows<Float16>(rows, query, dim), _mm512_set1_ps(bound.scale));
  }
  return dot_rows<uint16_t>(rows, query, dim);
}

#endif

// The score of one row, whatever the level.
float score_of(const RowsArgs& args, const char* row, const Bound& bound) {
  const int64_t dim = args.table.dim;
  const float* query = args.queries.floats + args.query * dim;
  const float* wide = args.scratch;
  if (args.table.stored == Stored::float32) {
    wide = reinterpret_cast<const float*>(row);
  } else if (args.table.stored == Stored::bfloat16) {
    widen_bfloat16(row, dim, args.scratch);
  } else if (args.table.stored == Stored::float16) {
    widen_float16(row, bound.scale, dim, args.scratch);
  } else {
    widen_int8(row, bound.scale, dim, args.scratch);
  }
  Vec sums = zero();
  int64_t at = 0;
  for (; at + kLanes <= dim; at += kLanes) sums = fma(load(wide + at), load(query + at), sums);
  alignas(64) float lanes[kLanes];
  store(lanes, sums);
  float sum = 0.0f;
  for (; at < dim; at++) sum += wide[at] * query[at];
  for (int i = 0; i < kLanes; i++) sum += lanes[i];
  return sum;
}

#if defined(__AMX_TILE__)

// First all sums, then all scores: a load that follows the stores of a tile would wait for them.
template <bool int8>
void tiled_scores(const RowsArgs& args) {
  const Table& table = args.table;
  const int64_t steps = args.queries.steps / 16, padded = round_up(table.n_rows, kStretch);
  const uint32_t* query = args.queries.words + args.query / kTile * args.queries.steps * kTile + args.query % kTile;
  static constexpr NarrowTileShapes kShapes;
  _tile_loadconfig(&kShapes);
  for (int64_t first = 0; first < table.n_rows; first += kBlock) {
    if (args.allowed != nullptr && args.allowed[first / kBlock] == 0) continue;
    const int64_t here = table.n_rows - first < kBlock ? table.n_rows - first : kBlock;
    const char* rows = table.row(first);
    if (here < kBlock) {
      std::memcpy(args.scratch, rows, static_cast<size_t>(here * table.row_bytes));
      std::memset(reinterpret_cast<char*>(args.scratch) + here * table.row_bytes, 0,
                  static_cast<size_t>((kBlock - here) * table.row_bytes));
      rows = reinterpret_cast<const char*>(args.scratch);
    }
    dot_with_narrow_tiles<int8>(rows, table.row_bytes, query, steps, args.scores + first);
  }
  _tile_release();
  const __m512 none = _mm512_set1_ps(kNone);
  const __m512i zero = _mm512_set1_epi32(args.queries.zero[args.query]);
  for (int64_t first = 0; first < padded; first += kBlock) {
    const int64_t left = table.n_rows - first;
    uint64_t valid = left >= kBlock ? ~uint64_t{0} : left > 0 ? (uint64_t{1} << left) - 1u : 0;
    if (args.allowed != nullptr && valid != 0) valid &= args.allowed[first / kBlock];
    const __m512 scale =
        _mm512_set1_ps(left > 0 ? args.queries.scale[args.query] * table.bounds[first / kBlock].scale : 1.0f);
    for (int64_t i = 0; i < kBlock; i += 16) {
      float* const at = args.scores + first + i;
      const __m512i sums = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(valid >> i), at);
      const __m512 scores = int8 ? _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, zero)), scale)
                                 : _mm512_castsi512_ps(sums);
      _mm512_storeu_ps(at, _mm512_mask_blend_ps(static_cast<__mmask16>(valid >> i), none, scores));
    }
  }
}

#endif

}  // namespace

void topk_row_scores(const RowsArgs& args) {
  const Table& table = args.table;
#if defined(__AMX_TILE__)
  if (args.product == Product::int8_tiles) return tiled_scores<true>(args);
  if (args.product == Product::bfloat16_tiles) return tiled_scores<false>(args);
#endif
  const int64_t padded = round_up(table.n_rows, kStretch);
#if defined(__AVX512F__)
  const bool together = table.stored != Stored::int8 || args.product == Product::int8;
#else
  const bool together = false;
#endif
  for (int64_t first = 0; first < padded; first += kBlock) {
    const int64_t left = table.n_rows - first, here = left < kBlock ? left : kBlock;
    float* out = args.scores + first;
    const int64_t number = first / kBlock;
    if (here <= 0 || (args.allowed != nullptr && args.allowed[number] == 0)) {
      for (int64_t i = 0; i < kBlock; i++) out[i] = kNone;
      continue;
    }
    const char* row = table.row(first);
    const Bound& bound = table.bounds[number];
    uint64_t valid = here == kBlock ? ~uint64_t{0} : (uint64_t{1} << here) - 1u;
    if (args.allowed != nullptr) valid &= args.allowed[number];
    if (together) {
#if defined(__AVX512F__)
      for (int64_t group = 0; group < kBlock; group += 16) {
        const char* rows[16];
        for (int64_t i = 0; i < 16; i++) rows[i] = row + (group + i < here ? group + i : 0) * table.row_bytes;
        const __m512 scores = scores_of(args, rows, bound);
        const __mmask16 kept = static_cast<__mmask16>(valid >> group);
        _mm512_storeu_ps(out + group, _mm512_mask_blend_ps(kept, _mm512_set1_ps(kNone), scores));
      }
#endif
    } else {
      for (int64_t i = 0; i < kBlock; i++) {
        out[i] = (valid >> i) & 1u ? score_of(args, row + i * table.row_bytes, bound) : kNone;
      }
    }
  }
}

int64_t topk_row_floors(const RowsArgs& args) {
  const int64_t padded = round_up(args.table.n_rows, kStretch), last = (args.table.n_rows - 1) / kBlock;
  constexpr int64_t kRows = 16 * kLanes;  // of kLanes groups: a group is a lane of 16 vectors
  float* low = args.low;
  for (int64_t first = 0; first < padded; first += kRows, low += kLanes) {
    Vec highest = set1(kNone);
    for (int64_t at = first; at < first + kRows; at += kBlock) {
      if (at / kBlock > last) break;
      const Vec room = set1(slack(args, args.table.bounds[at / kBlock]));
      for (int64_t i = 0; i < kBlock; i += kLanes) highest = max(highest, load(args.scores + at + i) - room);
    }
    store(low, highest);
  }
  return padded / 16;
}

int64_t topk_rows_reaching(const RowsArgs& args, float floor) {
  constexpr float kLowest = -3.4028234663852886e38f;  // -inf is no score
  int64_t n = 0;
  for (int64_t first = 0; first < args.table.n_rows; first += kBlock) {
    const float low = floor - slack(args, args.table.bounds[first / kBlock]);
    const Vec threshold = set1(low > kLowest ? low : kLowest);
    const float* scores = args.scores + first;
    Vec highest = load(scores);
    for (int64_t i = kLanes; i < kBlock; i += kLanes) highest = max(highest, load(scores + i));
    if (__builtin_expect(bits(greater(threshold, highest)) == (1u << kLanes) - 1u, 1)) continue;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      uint32_t hits = ~bits(greater(threshold, load(scores + i))) & ((1u << kLanes) - 1u);
      for (; hits != 0; hits &= hits - 1) args.rows[n++] = static_cast<int32_t>(first + i + __builtin_ctz(hits));
    }
  }
  return n;
}

}  // namespace FASTDIFF_LEVEL
}  // namespace fastdiff
