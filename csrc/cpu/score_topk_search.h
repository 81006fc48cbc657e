// score_topk without torch: from plain pointers to the k best rows of each query, exactly.
#pragma once

#include <cstdint>
#include <vector>

#include "score_topk.h"

namespace fastdiff {
namespace topk {

// One list of rows per query, end to end; no lists at all where offsets is null.
struct Lists {
  const int64_t* values = nullptr;
  const int64_t* offsets = nullptr;  // [n_queries + 1]
};

struct Search {
  const float* queries;  // [n_queries, dim]
  int64_t n_queries, k;
  Table items;                    // the float32 rows that the definition scores; one chunk
  Table scan;                     // the same rows as the scan reads them
  bool certified = true;          // false: keep the k best by the scan's own scores, whatever it may be wrong by
  const bool* allowed = nullptr;  // [n_rows]
  Lists exclude, candidates;
  int threads = 1;
  int64_t spare_bytes = 16 << 20;  // for queries of whom many rows are within the bound; beyond it they go another way
  int64_t* rows;                   // [n_queries, k]
  float* scores;                   // [n_queries, k]
};

// How many queries went which way, for tests and measurements.
struct Report {
  int64_t scanned = 0;        // queries of the first scan
  int64_t guessed_wrong = 0;  // scanned a second time, because a sample misled
  int64_t scanned_again = 0;  // of whom it kept too many, scanned in float32
  int64_t by_definition = 0;  // of whom that kept too many, or that were not worth a scan
  int64_t rescored = 0;       // rows scored by the definition after scans
};

// Throws std::runtime_error for a query with NaN or infinity, and for listed rows outside the table.
void search(const Search& search, Report* report = nullptr);

// Bounds, and rows as they are stored (null for float32), of float32 rows; one slice of a table, from a block's start.
void pack(const char* items, int64_t row_bytes, int64_t dim, int64_t n_rows, Stored stored, char* rows, Bound* bounds,
          int threads);

}  // namespace topk
}  // namespace fastdiff
