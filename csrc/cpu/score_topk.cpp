#include "score_topk_search.h"

#include "../tensors.h"

namespace fastdiff {
namespace {

using namespace topk;

constexpr const char* kOp = "score_topk";
constexpr int kOneChunk = 62;  // a shift by which every row is of the first chunk
constexpr int64_t kChunk = 16;

// Of the packed rows; float32 ones are not packed.
ScalarType dtype_of(Stored stored) {
  if (stored == Stored::bfloat16) return ScalarType::BFloat16;
  return stored == Stored::float16 ? ScalarType::Half : ScalarType::Byte;
}

// Rows that lie one behind the other need not do so without gaps.
Tensor rows_of(const char* op, const char* name, const Tensor& table, int64_t dim) {
  if (table.is_cpu() && table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(1) == dim &&
      (dim == 1 || table.stride(1) == 1) && table.stride(0) >= dim) {
    return table;
  }
  return floats(op, name, table, {-1, dim});
}

int64_t bytes_between_rows(const Tensor& table) { return (table.size(0) > 1 ? table.stride(0) : table.size(1)) * 4; }

Lists lists_of(const char* name, const MaybeTensor& values, const MaybeTensor& offsets, int64_t n,
               MaybeTensor& hold_values, MaybeTensor& hold_offsets) {
  Lists lists;
  if (!values.has_value()) return lists;
  FASTDIFF_CHECK(offsets.has_value(), kOp, ": ", name, " needs offsets");
  hold_values = checked(kOp, name, *values, ScalarType::Long, {-1});
  hold_offsets = checked(kOp, name, *offsets, ScalarType::Long, {n + 1});
  lists.values = data<int64_t>(*hold_values);
  lists.offsets = data<int64_t>(*hold_offsets);
  FASTDIFF_CHECK(lists.offsets[0] == 0 && lists.offsets[n] == hold_values->size(0), kOp, ": ", name,
                 " must have offsets from 0 to the number of values");
  for (int64_t i = 0; i < n; i++) {
    FASTDIFF_CHECK(lists.offsets[i] <= lists.offsets[i + 1], kOp, ": ", name, " must have offsets that never fall");
  }
  return lists;
}

std::tuple<Tensor, Tensor> score_topk(const Tensor& query, const Tensor& item_emb, int64_t k,
                                      const MaybeTensor& allowed, const MaybeTensor& exclude,
                                      const MaybeTensor& exclude_offsets, const MaybeTensor& candidates,
                                      const MaybeTensor& candidate_offsets, int64_t stored, std::vector<Tensor> chunks,
                                      const Tensor& bounds, bool certified) {
  const Tensor queries = floats(kOp, "query", query, {-1, -1});
  const int64_t n = queries.size(0), dim = queries.size(1);
  const Tensor items = rows_of(kOp, "item_emb", item_emb, dim);
  const int64_t n_rows = items.size(0);
  FASTDIFF_CHECK(dim >= 1 && k >= 1 && n_rows < (int64_t{1} << 31), kOp, ": wants D >= 1, k >= 1 and N < 2^31");
  FASTDIFF_CHECK(stored >= 0 && stored <= 3, kOp, ": stored must be 0, 1, 2 or 3 (got ", stored, ")");
  const Tensor all_bounds = floats(kOp, "bounds", bounds, {(n_rows + kBlock - 1) / kBlock, 4});

  const char* item_rows[1] = {static_cast<const char*>(items.const_data_ptr())};
  Search call;
  call.queries = data<float>(queries);
  call.n_queries = n;
  call.k = k;
  call.items = Table{Stored::float32,
                     item_rows,
                     kOneChunk,
                     bytes_between_rows(items),
                     n_rows,
                     dim,
                     reinterpret_cast<const Bound*>(data<float>(all_bounds))};
  call.scan = call.items;
  std::vector<const char*> scan_rows;
  if (stored != 0) {
    const ScalarType dtype = dtype_of(static_cast<Stored>(stored));
    const int64_t size = int64_t{1} << kChunk, n_chunks = (n_rows + size - 1) / size;
    FASTDIFF_CHECK(static_cast<int64_t>(chunks.size()) >= n_chunks, kOp, ": chunks must hold all rows");
    for (int64_t i = 0; i < n_chunks; i++) {
      Tensor& chunk = chunks[static_cast<size_t>(i)];
      chunk = checked(kOp, "chunks", chunk, dtype, {-1, dim});
      FASTDIFF_CHECK(chunk.size(0) >= std::min(size, n_rows - i * size), kOp, ": chunks must hold all rows");
      scan_rows.push_back(static_cast<const char*>(chunk.const_data_ptr()));
    }
    call.scan.stored = static_cast<Stored>(stored);
    call.scan.chunks = scan_rows.data();
    call.scan.chunk_shift = kChunk;
    call.scan.row_bytes = dim * bytes_of(call.scan.stored);
  }
  call.certified = certified;
  MaybeTensor mask, held[4];
  if (allowed.has_value()) {
    mask = checked(kOp, "allowed", *allowed, ScalarType::Bool, {n_rows});
    call.allowed = data<bool>(*mask);
  }
  call.exclude = lists_of("user_exclude", exclude, exclude_offsets, n, held[0], held[1]);
  call.candidates = lists_of("user_candidates", candidates, candidate_offsets, n, held[2], held[3]);
  call.threads = num_threads();
  Tensor rows = empty_like_with(queries, {n, k}, ScalarType::Long),
         scores = empty_like_with(queries, {n, k}, ScalarType::Float);
  call.rows = mutable_data<int64_t>(rows);
  call.scores = mutable_data<float>(scores);
  search(call);
  return {rows, scores};
}

std::tuple<Tensor, Tensor> topk_pack(const Tensor& item_emb, int64_t stored) {
  FASTDIFF_CHECK(item_emb.dim() == 2, "topk_pack: item_emb must be [N, D] (got ", shape_of(item_emb), ")");
  FASTDIFF_CHECK(stored >= 0 && stored <= 3, "topk_pack: stored must be 0, 1, 2 or 3 (got ", stored, ")");
  const int64_t n_rows = item_emb.size(0), dim = item_emb.size(1);
  const Tensor items = rows_of("topk_pack", "item_emb", item_emb, dim);
  Tensor rows = empty_like_with(items, {stored == 0 ? 0 : n_rows, dim}, dtype_of(static_cast<Stored>(stored)));
  Tensor bounds = empty_like_with(items, {(n_rows + kBlock - 1) / kBlock, 4}, ScalarType::Float);
  pack(static_cast<const char*>(items.const_data_ptr()), bytes_between_rows(items), dim, n_rows,
       static_cast<Stored>(stored), stored == 0 ? nullptr : static_cast<char*>(rows.mutable_data_ptr()),
       reinterpret_cast<Bound*>(mutable_data<float>(bounds)), num_threads());
  return {rows, bounds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("score_topk", TORCH_BOX(&score_topk));
  m.impl("topk_pack", TORCH_BOX(&topk_pack));
}

}  // namespace fastdiff
