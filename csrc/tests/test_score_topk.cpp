// score_topk's search against its definition, over kinds of tables, restrictions, sizes and threads, at every level.
#include <algorithm>
#include <thread>

#include "../cpu/score_topk_search.h"
#include "check.h"

namespace fastdiff {
namespace tests {
namespace {

using namespace topk;

constexpr int kShift = 10;  // rows of a chunk: 1024
constexpr Stored kAllStored[] = {Stored::float32, Stored::bfloat16, Stored::int8, Stored::float16};

struct Vectors {
  std::string name;
  int64_t n, dim;
  std::vector<float> rows;
};

struct Packed {
  Stored stored;
  std::vector<std::vector<char>> chunks;  // of the exact size
  std::vector<const char*> pointers;
  std::vector<Bound> bounds;

  Packed(const Vectors& items, Stored stored, int threads) : stored(stored), bounds((items.n + kBlock - 1) / kBlock) {
    const int64_t element = bytes_of(stored), size = 1 << kShift;
    const char* rows = reinterpret_cast<const char*>(items.rows.data());
    for (int64_t first = 0; first < items.n; first += size) {
      const int64_t here = std::min(size, items.n - first);
      const char* source = rows + first * items.dim * 4;
      if (stored == Stored::float32) {
        chunks.emplace_back(source, source + here * items.dim * 4);
      } else {
        chunks.emplace_back(static_cast<size_t>(here * items.dim * element));
      }
      pack(source, items.dim * 4, items.dim, here, stored, stored == Stored::float32 ? nullptr : chunks.back().data(),
           bounds.data() + first / kBlock, threads);
    }
    for (const auto& chunk : chunks) pointers.push_back(chunk.data());
  }
  Table table(const Vectors& items) const {
    const int64_t element = bytes_of(stored);
    return {stored, pointers.data(), kShift, items.dim * element, items.n, items.dim, bounds.data()};
  }
};

struct Restricted {
  std::vector<char> allowed;                                                       // empty: all
  std::vector<int64_t> excluded, excluded_offsets, candidates, candidate_offsets;  // offsets empty: none
};

using Best = std::vector<std::pair<float, int64_t>>;  // (-score, row)

std::vector<Best> definition(const Vectors& items, const std::vector<float>& queries, int64_t k,
                             const Restricted& given) {
  const int64_t n = static_cast<int64_t>(queries.size()) / items.dim;
  std::vector<Best> all(static_cast<size_t>(n));
  for (int64_t q = 0; q < n; q++) {
    std::vector<char> may(static_cast<size_t>(items.n), 1);
    if (!given.candidate_offsets.empty()) {
      std::fill(may.begin(), may.end(), 0);
      for (int64_t i = given.candidate_offsets[q]; i < given.candidate_offsets[q + 1]; i++)
        may[given.candidates[i]] = 1;
    }
    for (int64_t i = 0; i < items.n && !given.allowed.empty(); i++) may[i] = may[i] && given.allowed[i];
    if (!given.excluded_offsets.empty()) {
      for (int64_t i = given.excluded_offsets[q]; i < given.excluded_offsets[q + 1]; i++) may[given.excluded[i]] = 0;
    }
    for (int64_t row = 0; row < items.n; row++) {
      if (!may[row]) continue;
      double sum = 0.0;
      for (int64_t i = 0; i < items.dim; i++) {
        sum += static_cast<double>(queries[q * items.dim + i]) * static_cast<double>(items.rows[row * items.dim + i]);
      }
      all[q].emplace_back(-(static_cast<float>(sum) + 0.0f), row);
    }
    std::sort(all[q].begin(), all[q].end());
    if (static_cast<int64_t>(all[q].size()) > k) all[q].resize(static_cast<size_t>(k));
  }
  return all;
}

Report compare(const Vectors& items, const Packed& packed, const std::vector<float>& queries, int64_t k,
               const Restricted& given, int threads, const std::vector<Best>& truth) {
  const int64_t n = static_cast<int64_t>(queries.size()) / items.dim;
  std::vector<int64_t> rows(static_cast<size_t>(n * k));
  std::vector<float> scores(rows.size());
  const char* whole[1] = {reinterpret_cast<const char*>(items.rows.data())};
  Search call;
  call.queries = queries.data();
  call.n_queries = n;
  call.k = k;
  call.items = {Stored::float32, whole, 62, items.dim * 4, items.n, items.dim, packed.bounds.data()};
  call.scan = packed.table(items);
  call.allowed = given.allowed.empty() ? nullptr : reinterpret_cast<const bool*>(given.allowed.data());
  if (!given.excluded_offsets.empty()) call.exclude = {given.excluded.data(), given.excluded_offsets.data()};
  if (!given.candidate_offsets.empty()) call.candidates = {given.candidates.data(), given.candidate_offsets.data()};
  call.threads = threads;
  if (threads == 3) call.spare_bytes = 0;
  call.rows = rows.data();
  call.scores = scores.data();
  Report report;
  search(call, &report);
  for (int64_t q = 0; q < n; q++) {
    for (int64_t i = 0; i < k; i++) {
      const bool there = i < static_cast<int64_t>(truth[q].size());
      const int64_t row = there ? truth[q][i].second : -1;
      const float score = there ? -truth[q][i].first : -std::numeric_limits<float>::infinity();
      EXPECT(rows[q * k + i] == row && scores[q * k + i] == score, items.name, " stored ",
             static_cast<int>(packed.stored), " dim ", items.dim, " k ", k, " threads ", threads, ": query ", q,
             " place ", i, " is row ", rows[q * k + i], " with ", scores[q * k + i], ", not ", row, " with ", score);
    }
  }
  return report;
}

std::vector<Vectors> tables(int64_t n, int64_t dim) {
  Draws draws(static_cast<uint64_t>(n + dim));
  std::vector<Vectors> all;
  all.push_back({"gaussian", n, dim, draws.normals(n * dim)});
  Vectors few{"duplicated", n, dim, draws.normals(n * dim)};
  for (int64_t i = 11 * dim; i < n * dim; i++) few.rows[i] = few.rows[i % (11 * dim)];
  all.push_back(few);
  Vectors near{"near ties", n, dim, draws.normals(n * dim, 1e-5)};
  for (int64_t i = 0; i < n * dim; i++) near.rows[i] += static_cast<float>(i % dim % 7) - 3.0f;
  all.push_back(near);
  Vectors one{"one huge row", n, dim, draws.normals(n * dim)};
  for (int64_t i = 0; i < dim; i++) one.rows[n / 2 * dim + i] *= 1e9f;
  all.push_back(one);
  all.push_back({"subnormal", n, dim, draws.normals(n * dim, 1e-40)});
  Vectors sorted{"ascending", n, dim, draws.normals(n * dim, 1e-2)};  // every row better than those before
  for (int64_t i = 0; i < n; i++) sorted.rows[i * dim] = static_cast<float>(i) / static_cast<float>(n);
  all.push_back(sorted);
  return all;
}

Restricted restrictions(int64_t n, int64_t n_queries, double share, bool lists, bool candidates) {
  Draws draws(5);
  Restricted given;
  for (int64_t i = 0; i < n && share < 1.0; i++) given.allowed.push_back(draws.uniform() < share);
  const auto draw = [&](std::vector<int64_t>& values, std::vector<int64_t>& offsets) {
    offsets.push_back(0);
    for (int64_t q = 0; q < n_queries; q++) {
      for (int64_t i = draws.below(400); i > 0; i--) values.push_back(draws.below(n));
      offsets.push_back(static_cast<int64_t>(values.size()));
    }
  };
  if (lists) draw(given.excluded, given.excluded_offsets);
  if (candidates) draw(given.candidates, given.candidate_offsets);
  return given;
}

void every_table() {
  int64_t scanned = 0, scanned_again = 0, by_definition = 0;
  for (const auto& [n, dim] : std::vector<std::pair<int64_t, int64_t>>{{3001, 7}, {2500, 64}, {33000, 5}}) {
    for (const Vectors& items : tables(n, dim)) {
      Draws draws(9);
      for (const int64_t n_queries : {1, 19}) {
        if (n > 30000 && n_queries > 1) continue;
        std::vector<float> queries = draws.normals(n_queries * dim);
        if (items.name == "ascending") queries[0] = 100.0f;
        for (const int64_t k : {1, 40}) {
          const std::vector<Best> truth = definition(items, queries, k, {});
          for (const Stored stored : kAllStored) {
            const Report report =
                compare(items, Packed(items, stored, 2), queries, k, {}, n_queries == 1 ? 1 : 3, truth);
            scanned += report.scanned;
            scanned_again += report.scanned_again;
            by_definition += report.by_definition;
          }
        }
      }
    }
  }
  EXPECT(scanned > 0 && by_definition > 0 && (scanned_again > 0 || level() < Level::avx512_vnni), "every way is taken");
}

void every_restriction() {
  const Vectors items = tables(5003, 12)[0];
  Draws draws(3);
  const std::vector<float> queries = draws.normals(5 * items.dim);
  for (const double share : {1.0, 0.6, 0.1, 0.001, 0.0}) {
    for (const bool lists : {false, true}) {
      for (const bool candidates : {false, true}) {
        const Restricted given = restrictions(items.n, 5, share, lists, candidates);
        const std::vector<Best> truth = definition(items, queries, 25, given);
        for (const Stored stored : kAllStored) {
          compare(items, Packed(items, stored, 1), queries, 25, given, 2, truth);
        }
      }
    }
  }
}

// Lists of every kind that a scan has to cope with, beside each other, over a table that is sampled and one that is not.
void every_kind_of_denied() {
  for (const int64_t n : {4001, 40001}) {
    const Vectors items = tables(n, 12)[0];
    const int64_t n_queries = 7, k = 20;
    Draws draws(8);
    const std::vector<float> queries = draws.normals(n_queries * items.dim);
    const std::vector<Best> best = definition(items, queries, 1000, {});
    Restricted given;
    std::vector<int64_t>& denied = given.excluded;
    const auto end_of_list = [&] { given.excluded_offsets.push_back(static_cast<int64_t>(denied.size())); };
    end_of_list();
    for (const auto& place : best[0]) denied.push_back(place.second);  // the best
    end_of_list();
    end_of_list();  // none
    for (int time = 0; time < 3; time++) {  // the best, worst first, three times
      for (int64_t i = 300; i-- > 0;) denied.push_back(best[2][i].second);
    }
    end_of_list();
    for (int64_t row = 0; row < n; row++) {  // every block that a sample reads
      if (row / kBlock % 32 == 0) denied.push_back(row);
    }
    end_of_list();
    for (int64_t row = 0; row < n; row++) {  // every block but some, and the last row
      if (row / kBlock % 5 != 3) denied.push_back(row);
    }
    denied.push_back(n - 1);
    end_of_list();
    for (int64_t row = 0; row < n; row++) {  // all but the best and a few: fewer than k
      if (row % (n / 7) != 0 && row != best[5][0].second) denied.push_back(row);
    }
    end_of_list();
    for (int64_t row = 0; row < n; row++) denied.push_back(row);  // all
    end_of_list();
    const std::vector<Best> truth = definition(items, queries, k, given);
    for (const Stored stored : kAllStored) {
      const Packed packed(items, stored, 2);
      for (const int threads : {1, 2, 3}) compare(items, packed, queries, k, given, threads, truth);
    }
  }
}

void every_k() {
  const Vectors items = tables(1100, 9)[0];
  Draws draws(4);
  const std::vector<float> queries = draws.normals(2 * items.dim);
  for (const int64_t k : {1, 130, 140, 1099, 1100, 1105}) {
    compare(items, Packed(items, Stored::int8, 1), queries, k, {}, 2, definition(items, queries, k, {}));
  }
}

void many_callers() {
  const Vectors items = tables(2500, 64)[0];
  const Packed packed(items, Stored::int8, 2);
  Draws draws(6);
  const std::vector<float> queries = draws.normals(20 * items.dim);
  const std::vector<Best> truth = definition(items, queries, 10, {});
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++) {
    callers.emplace_back([&] {
      for (int call = 0; call < 5; call++) compare(items, packed, queries, 10, {}, 3, truth);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff::tests;
  at_every_level([] {
    every_table();
    every_restriction();
    every_kind_of_denied();
    every_k();
    many_callers();
  });
  return 0;
}
