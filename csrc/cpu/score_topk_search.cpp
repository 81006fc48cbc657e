#include "score_topk_search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "../check.h"
#include "score_topk_exact.h"
#include "score_topk_rows.h"
#include "scratch.h"
#include "thread_pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastdiff {
namespace topk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLargest = 0x1p126;        // scores below this cannot overflow float32 on the way
constexpr int64_t kWidest = 1 << 16;        // wider vectors are scored by the definition: the bounds would be loose
constexpr int64_t kBufferBytes = 32 << 20;  // for what scans keep, all threads and queries together
constexpr int64_t kFewRows = 256;           // tables up to this size are scored by the definition
constexpr int64_t kFewQueries = 3;          // up to so many read rows where they lie, by vectors
constexpr int64_t kSmallTable = 1 << 15;    // and have all their scores in memory where the table is this small,
constexpr int64_t kSmallBytes = 2 << 20;    // also in bytes: one thread reads it from its second-level cache

// --- the order
// --------------------------------------------------------------------------------------------------------

// Larger is better: score descending, then row ascending. No NaN, no -0.
uint64_t to_key(float score, uint32_t row) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(bits) << 32) | (0xffffffffu - row);
}

void from_key(uint64_t key, int64_t* row, float* score) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
  std::memcpy(score, &bits, 4);
  *row = static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// The best first; at most k of them.
void best_first(std::vector<uint64_t>& keys, int64_t k) {
  const auto descending = [](uint64_t a, uint64_t b) { return a > b; };
  if (static_cast<int64_t>(keys.size()) > k) {
    std::nth_element(keys.begin(), keys.begin() + k, keys.end(), descending);
    keys.resize(static_cast<size_t>(k));
  }
  std::sort(keys.begin(), keys.end(), descending);
}

void write(const std::vector<uint64_t>& keys, int64_t k, int64_t* rows, float* scores) {
  const int64_t n = std::min<int64_t>(k, static_cast<int64_t>(keys.size()));
  for (int64_t i = 0; i < n; i++) from_key(keys[static_cast<size_t>(i)], rows + i, scores + i);
  std::fill(rows + n, rows + k, -1);
  std::fill(scores + n, scores + k, -kInfinity);
}

// --- memory
// -----------------------------------------------------------------------------------------------------------

template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t n = 0) : n_(n) {
    if (n > 0) data_ = static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), std::align_val_t(64)));
  }
  Aligned(Aligned&& other) noexcept : data_(other.data_), n_(other.n_) { other.data_ = nullptr; }
  Aligned& operator=(Aligned&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(n_, other.n_);
    return *this;
  }
  ~Aligned() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t(64));
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  void fill(T value) const { std::fill(data_, data_ + n_, value); }

 private:
  T* data_ = nullptr;
  int64_t n_;
};

// --- what is left of a query's rows, scored by the definition
// ----------------------------------------------------------------

// Of one task: its memory is used for one query after the other.
class Rescoring {
 public:
  explicit Rescoring(const Search& search) : search_(search), scratch_(16 * search.scan.dim) {}

  // The k best of the rows named (each once) become the answer of the query.
  void write_of(int64_t query, const std::vector<int32_t>& rows) {
    scores_.resize(rows.size());
    ExactArgs args;
    args.query = search_.queries + query * search_.scan.dim;
    args.items = search_.items.chunks[0];
    args.row_bytes = search_.items.row_bytes;
    args.dim = search_.scan.dim;
    args.rows = rows.data();
    args.first = 0;
    args.n = static_cast<int64_t>(rows.size());
    args.scores = scores_.data();
    args.scratch = scratch_.get();
    exact_(args);
    keys_.resize(rows.size());
    for (size_t i = 0; i < rows.size(); i++) keys_[i] = to_key(scores_[i], static_cast<uint32_t>(rows[i]));
    best_first(keys_, search_.k);
    write(keys_, search_.k, search_.rows + query * search_.k, search_.scores + query * search_.k);
  }

 private:
  const Search& search_;
  Aligned<float> scratch_;
  std::vector<float> scores_;
  std::vector<uint64_t> keys_;
  void (*const exact_)(const ExactArgs&) = FASTDIFF_PICK(topk_exact);
};

float up(double value) { return static_cast<float>(value * (1.0 + 0x1p-20) + 0x1p-120); }

// --- queries
// ----------------------------------------------------------------------------------------------------------

// vdpbf16ps is worth it where it is faster than float32 arithmetic, which is so on AMD's processors, not on Intel's.
bool fast_bfloat16() {
#if defined(__x86_64__)
  static const bool amd = [] {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == 0x68747541;  // "Auth"
  }();
  return amd;
#else
  return false;
#endif
}

// few: for kFewQueries or less of any table, or of one whose scores all fit into memory.
enum class Few { no, queries, queries_of_small_table };

Product product_for(const Table& table, Few few) {
  const Level now = level();
  const Stored stored = table.stored;
  if (few == Few::queries_of_small_table) {
    if (stored == Stored::float32) return Product::float32;
    if (now >= Level::amx && table.row_bytes % 64 == 0) {
      return stored == Stored::int8 ? Product::int8_tiles : Product::bfloat16_tiles;
    }
    return stored == Stored::int8 && now >= Level::avx512_vnni ? Product::int8 : Product::float32;
  }
  if (few == Few::queries && (stored == Stored::float32 || (stored == Stored::bfloat16 && now < Level::amx))) {
    return Product::float32;  // that needs no rounding
  }
  if (stored == Stored::int8) {
    if (now >= Level::amx) return Product::int8_tiles;
    return now >= Level::avx512_vnni ? Product::int8 : Product::float32;
  }
  if (now >= Level::amx) return Product::bfloat16_tiles;
  if (now >= Level::avx512_bf16 && stored == Stored::bfloat16 && fast_bfloat16()) return Product::bfloat16;
  return Product::float32;
}

uint32_t bfloat16_bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
}

float from_bfloat16(uint32_t bits) {
  const uint32_t word = bits << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// Some of the queries in the form of a product, with the factors of their slack.
class Prepared {
 public:
  // residual: whether the table's bounds hold what its rows lose in this product; if not, the worst case is taken
  Prepared(const Search& search, const std::vector<int64_t>& which, Product product, Stored stored, bool residual,
           double largest_norm)
      : n_(static_cast<int64_t>(which.size())),
        padded_(round_up(n_, kTile)),
        dim_(search.scan.dim),
        floats_(product == Product::float32 ? padded_ * dim_ : 0),
        factors_(4 * padded_),
        zero_(padded_) {
    const bool int8 = product == Product::int8 || product == Product::int8_tiles;
    const bool tiles = product == Product::bfloat16_tiles || product == Product::int8_tiles;
    const int64_t per_word = int8 ? 4 : 2;
    if (product != Product::float32) {
      steps_ = (dim_ + per_word - 1) / per_word;
      if (tiles) steps_ = round_up(steps_, 16);
      words_ = Aligned<uint32_t>(padded_ * steps_);
      words_.fill(0);
    } else {
      std::fill(&floats_[n_ * dim_], &floats_[padded_ * dim_], 0.0f);
    }
    factors_.fill(0.0f);
    zero_.fill(0);
    float *by_residual = factors_.get(), *by_norm = by_residual + padded_, *tiny = by_norm + padded_,
          *scale = tiny + padded_;
    std::fill(scale, scale + padded_, 1.0f);
    const double unit = product == Product::bfloat16 || product == Product::bfloat16_tiles ? 0x1p-22 : 0x1p-24;
    const double terms = static_cast<double>(dim_ + 16) * unit, gamma = terms / (1.0 - terms);
    for (int64_t i = 0; i < n_; i++) {
      const float* query = search.queries + which[static_cast<size_t>(i)] * dim_;
      double norm = 0.0, lost = 0.0;
      for (int64_t k = 0; k < dim_; k++) norm += static_cast<double>(query[k]) * static_cast<double>(query[k]);
      norm = std::sqrt(norm);
      if (product == Product::float32) {
        std::copy(query, query + dim_, &floats_[i * dim_]);
      } else if (int8) {
        float largest = 0.0f;
        for (int64_t k = 0; k < dim_; k++) largest = std::max(largest, std::fabs(query[k]));
        scale[i] = std::max(largest / 127.0f, 0x1p-60f);
        const float inverse = 1.0f / scale[i];
        int32_t sum = 0;
        for (int64_t k = 0; k < dim_; k++) {
          const float whole = std::min(127.0f, std::max(-127.0f, std::nearbyint(query[k] * inverse)));
          const double miss =
              static_cast<double>(query[k]) - static_cast<double>(whole) * static_cast<double>(scale[i]);
          lost += miss * miss;
          sum += static_cast<int32_t>(whole);
          const uint32_t byte = static_cast<uint8_t>(static_cast<int8_t>(whole));
          word(i, k / 4, tiles) |= byte << (8 * (k % 4));
        }
        zero_[i] = 128 * sum;
      } else {
        for (int64_t k = 0; k < dim_; k++) {
          const uint32_t half = bfloat16_bits(query[k]);
          const double miss = static_cast<double>(query[k]) - static_cast<double>(from_bfloat16(half));
          lost += miss * miss;
          word(i, k / 2, tiles) |= half << (16 * (k % 2));
        }
      }
      lost = std::sqrt(lost);
      if (!search.certified) continue;
      const bool rounded = !(product == Product::float32 && stored == Stored::float32);  // whether rows lose anything
      by_residual[i] = rounded && residual ? up(norm) : 0.0f;
      by_norm[i] = up(lost + (norm + lost) * gamma + (rounded && !residual ? norm * 0x1.01p-8 : 0.0));
      const double d = static_cast<double>(dim_);
      tiny[i] = up(0x1p-124 * (2.0 * d + 1.0 + std::sqrt(d) * (norm + largest_norm)));
    }
  }

  Queries view() const {
    Queries queries;
    queries.n = n_;
    queries.n_padded = padded_;
    queries.floats = floats_.get();
    queries.words = words_.get();
    queries.steps = steps_;
    queries.by_residual = factors_.get();
    queries.by_norm = factors_.get() + padded_;
    queries.tiny = factors_.get() + 2 * padded_;
    queries.scale = factors_.get() + 3 * padded_;
    queries.zero = zero_.get();
    return queries;
  }

 private:
  uint32_t& word(int64_t query, int64_t word, bool tiles) const {
    return tiles ? words_[query / kTile * steps_ * kTile + word * kTile + query % kTile]
                 : words_[query * steps_ + word];
  }

  int64_t n_, padded_, dim_, steps_ = 0;
  Aligned<float> floats_;
  Aligned<uint32_t> words_;
  Aligned<float> factors_;
  Aligned<int32_t> zero_;
};

// --- rows that a query may not be given
// -------------------------------------------------------------------------------

class DeniedRows {
 public:
  DeniedRows(const Search& search, const std::vector<int64_t>& which) {
    if (search.exclude.offsets == nullptr) return;
    int64_t total = 0;
    std::vector<int64_t> starts;
    for (const int64_t query : which) {
      const int bits = bits_for(search, query);
      starts.push_back(total);
      if (bits > 0) total += int64_t{1} << bits;
      denied_.push_back(Denied{nullptr, bits});
    }
    places_ = Aligned<uint32_t>(total);
    const int64_t n = static_cast<int64_t>(which.size()), per_task = std::max<int64_t>(1, n / 64);
    parallel(total > 4096 ? search.threads : 1, (n + per_task - 1) / per_task, [&](int64_t task) {
      for (int64_t i = task * per_task; i < std::min(n, (task + 1) * per_task); i++) {
        Denied& denied = denied_[static_cast<size_t>(i)];
        if (denied.bits == 0) continue;
        uint32_t* places = places_.get() + starts[static_cast<size_t>(i)];
        const uint32_t mask = (1u << denied.bits) - 1u;
        std::fill(places, places + mask + 1, ~0u);
        const int64_t query = which[static_cast<size_t>(i)];
        for (int64_t j = search.exclude.offsets[query]; j < search.exclude.offsets[query + 1]; j++) {
          const uint32_t row = static_cast<uint32_t>(search.exclude.values[j]);
          uint32_t at = Denied::start(row, denied.bits);
          while (places[at] != ~0u && places[at] != row) at = (at + 1) & mask;
          places[at] = row;
        }
        denied.places = places;
      }
    });
  }

  // log2 of the places, at least four times the rows listed; 0 for none.
  static int bits_for(const Search& search, int64_t query) {
    const int64_t n =
        search.exclude.offsets == nullptr ? 0 : search.exclude.offsets[query + 1] - search.exclude.offsets[query];
    if (n == 0) return 0;
    int bits = 3;
    while ((int64_t{1} << bits) < 4 * n) bits++;
    return bits;
  }

  static int64_t bytes_for(const Search& search, int64_t query) {
    const int bits = bits_for(search, query);
    return bits == 0 ? 0 : int64_t{4} << bits;
  }

  const Denied* get() const { return denied_.empty() ? nullptr : denied_.data(); }

 private:
  std::vector<Denied> denied_;
  Aligned<uint32_t> places_;
};

// --- what is allowed to all
// -------------------------------------------------------------------------------------------

struct Allowed {
  std::vector<uint64_t> bits;  // a word per 64 rows; empty where all are allowed
  int64_t count = 0;

  Allowed(const Search& search) {
    if (search.allowed == nullptr) {
      count = search.scan.n_rows;
      return;
    }
    const int64_t n = search.scan.n_rows, n_blocks = (n + 63) / 64;
    bits.resize(static_cast<size_t>(n_blocks));
    for (int64_t block = 0; block < n_blocks; block++) {
      const unsigned char* flag = reinterpret_cast<const unsigned char*>(search.allowed) + block * 64;
      const int64_t here = std::min<int64_t>(64, n - block * 64);
      uint64_t word = 0;
      int64_t i = 0;
      for (; i + 8 <= here; i += 8) {  // eight bytes of 0 or 1 to eight bits
        uint64_t eight;
        std::memcpy(&eight, flag + i, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        word |= ((eight * 0x0102040810204080u) >> 56) << i;
#else
        for (int j = 0; j < 8; j++) word |= static_cast<uint64_t>(flag[i + j] != 0) << (i + j);
#endif
      }
      for (; i < here; i++) word |= static_cast<uint64_t>(flag[i] != 0) << i;
      bits[static_cast<size_t>(block)] = word;
      count += __builtin_popcountll(word);
    }
  }

  bool has(int64_t row) const { return bits.empty() || ((bits[static_cast<size_t>(row >> 6)] >> (row & 63)) & 1u); }

  std::vector<int32_t> rows() const {
    std::vector<int32_t> rows;
    rows.reserve(static_cast<size_t>(count));
    for (size_t block = 0; block < bits.size(); block++) {
      for (uint64_t word = bits[block]; word != 0; word &= word - 1) {
        rows.push_back(static_cast<int32_t>(block * 64 + static_cast<size_t>(__builtin_ctzll(word))));
      }
    }
    return rows;
  }
};

// --- keeping
// ----------------------------------------------------------------------------------------------------------

// The floors that all threads share: what one has found serves the others.
class Floors {
 public:
  explicit Floors(int64_t n) : floors_(new std::atomic<float>[static_cast<size_t>(n)]), n_(n) {
    for (int64_t i = 0; i < n; i++) floors_[static_cast<size_t>(i)].store(-kInfinity, std::memory_order_relaxed);
  }
  float raise(int64_t i, float floor) {
    std::atomic<float>& shared = floors_[static_cast<size_t>(i)];
    float now = shared.load(std::memory_order_relaxed);
    while (now < floor && !shared.compare_exchange_weak(now, floor, std::memory_order_relaxed)) {
    }
    return std::max(now, floor);
  }
  float get(int64_t i) const { return floors_[static_cast<size_t>(i)].load(std::memory_order_relaxed); }
  int64_t size() const { return n_; }

 private:
  std::unique_ptr<std::atomic<float>[]> floors_;
  int64_t n_;
};

struct Job;

struct Found {  // of one thread
  Job& job;
  Aligned<float> floor;
  std::vector<Kept> kept;
  Aligned<char> buffers, scratch;
  std::vector<Aligned<char>> grown;
  Slot slot;

  explicit Found(Job& job);
};

struct Job {
  const Search& search;
  int64_t k;  // the place whose score is the floor: in a sample, a higher one
  const Queries queries;
  int64_t capacity;
  Floors floors;
  float (*const floor_of)(const float*, int64_t, int64_t) = FASTDIFF_PICK(topk_floor);
  int64_t (*const prune)(Kept&, float) = FASTDIFF_PICK(topk_prune);
  std::atomic<int64_t> may_grow{search.spare_bytes};
  std::unique_ptr<std::atomic<bool>[]> given_up;

  Job(const Search& search, int64_t k, const Queries& queries, int64_t capacity)
      : search(search),
        k(k),
        queries(queries),
        capacity(capacity),
        floors(queries.n),
        given_up(new std::atomic<bool>[static_cast<size_t>(queries.n)]) {
    for (int64_t q = 0; q < queries.n; q++) given_up[static_cast<size_t>(q)].store(false, std::memory_order_relaxed);
  }
};

int64_t kept_bytes(int64_t capacity) { return 12 * capacity; }

Kept lay_out(char* memory, int64_t capacity) {
  Kept kept;
  kept.low = reinterpret_cast<float*>(memory);
  kept.high = kept.low + capacity;
  kept.row = reinterpret_cast<int32_t*>(kept.high + capacity);
  kept.count = 0;
  kept.capacity = capacity;
  return kept;
}

void make_room(Slot& slot, int64_t q) {
  Found& found = *static_cast<Found*>(slot.owner);
  Job& job = found.job;
  Kept& kept = found.kept[static_cast<size_t>(q)];
  std::atomic<bool>& given_up = job.given_up[static_cast<size_t>(q)];
  if (!given_up.load(std::memory_order_relaxed)) {
    slot.floor[q] = job.floors.raise(q, std::max(slot.floor[q], job.floor_of(kept.low, kept.count, job.k)));
    if (job.prune(kept, slot.floor[q]) <= kept.capacity - kept.capacity / 4) return;
    const int64_t capacity = 2 * kept.capacity, bytes = kept_bytes(capacity);
    if (job.may_grow.fetch_sub(bytes, std::memory_order_relaxed) >= bytes) {
      found.grown.emplace_back(bytes);
      Kept larger = lay_out(found.grown.back().get(), capacity);
      larger.count = kept.count;
      std::copy(kept.low, kept.low + kept.count, larger.low);
      std::copy(kept.high, kept.high + kept.count, larger.high);
      std::copy(kept.row, kept.row + kept.count, larger.row);
      kept = larger;
      return;
    }
    job.may_grow.fetch_add(bytes, std::memory_order_relaxed);
    given_up.store(true, std::memory_order_relaxed);
  }
  kept.count = 0;
  slot.floor[q] = kInfinity;
}

Found::Found(Job& job)
    : job(job),
      floor(job.queries.n_padded),
      buffers(kept_bytes(job.capacity) * job.queries.n),
      scratch(scratch_bytes(job.search.scan.dim, job.queries.n_padded)) {
  floor.fill(kInfinity);
  for (int64_t q = 0; q < job.queries.n; q++) {
    floor[q] = job.floors.get(q);
    kept.push_back(lay_out(buffers.get() + q * kept_bytes(job.capacity), job.capacity));
  }
  slot.floor = floor.get();
  slot.kept = kept.data();
  slot.scratch = scratch.get();
  slot.owner = this;
  slot.full = &make_room;
}

// --- the work in pieces
// -----------------------------------------------------------------------------------------------

// Tables of at least this many blocks are first sampled: one block of kStride.
constexpr int64_t kSampledBlocks = 512, kStride = 32;

// The blocks in pieces, for the threads to take; with the sample only, or without it.
class Pieces {
 public:
  Pieces(int64_t n_blocks, int slots, bool sampled) : n_blocks_(n_blocks), sampled_(sampled) {
    const int64_t blocks = std::min<int64_t>(256, std::max<int64_t>(16, n_blocks / (8 * slots)));
    size_ = sampled ? round_up(blocks, kStride) : blocks;
  }
  int64_t of_sample() const { return (n_blocks_ + kStride * kStride - 1) / (kStride * kStride); }
  int64_t of_rest() const { return (n_blocks_ + size_ - 1) / size_; }

  template <class Run>  // run(first block, behind the last)
  void run_sample(int64_t piece, const Run& run) const {
    const int64_t end = std::min(n_blocks_, (piece + 1) * kStride * kStride);
    for (int64_t block = piece * kStride * kStride; block < end; block += kStride) run(block, block + 1);
  }

  template <class Run>
  void run_rest(int64_t piece, const Run& run) const {
    const int64_t end = std::min(n_blocks_, (piece + 1) * size_);
    if (!sampled_) return run(piece * size_, end);
    for (int64_t block = piece * size_; block < end; block += kStride) {
      if (block + 1 < end) run(block + 1, std::min(end, block + kStride));
    }
  }

 private:
  int64_t n_blocks_, size_;
  bool sampled_;
};

// --- one scan
// ---------------------------------------------------------------------------------------------------------

// A guess at the nanoseconds of a scan by one thread, to decide what is worth a second one.
int64_t cost_of_scan(const Search& search, Stored stored, int64_t n_rows, int64_t n_queries) {
  const int64_t bytes = stored == Stored::float32 ? 4 : stored == Stored::bfloat16 ? 2 : 1;
  return n_rows * search.scan.dim * (bytes + n_queries / 8) / 24;
}

struct Way {
  const Table& table;
  Product product;
  bool residual;                     // whether table.bounds holds the product's residuals
  const std::vector<int32_t>* some;  // the only rows allowed; null: all
};

// How a query is left without an answer.
struct Left {
  std::vector<int64_t> guessed_wrong;  // the floor that the sample suggested was above the k-th best
  std::vector<int64_t> too_many;       // too many rows are within the bound
};

// Scans for the queries `which` and writes their answers.
//
// With `guess`, a large table is sampled first. The k-th best of the table is at about place k / kStride of the sample,
// so some places further down there is a score that more than k rows are likely to reach; only rows that may reach it
// are kept. Once the scan is over, k kept rows that surely reach it prove the guess right.
Left scan(const Search& search, const Way& way, const Allowed& allowed, const std::vector<int64_t>& which,
          int64_t capacity, double largest_norm, bool guess, Report& report) {
  const Prepared prepared(search, which, way.product, way.table.stored, way.residual, largest_norm);
  const DeniedRows denied(search, which);
  const int64_t n_rows = way.some == nullptr ? way.table.n_rows : static_cast<int64_t>(way.some->size());
  const int64_t n = static_cast<int64_t>(which.size()), n_blocks = (n_rows + kBlock - 1) / kBlock;
  const int64_t cost = cost_of_scan(search, way.table.stored, n_rows, n);
  const int slots = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(search.threads, cost / 20000)));
  guess = guess && n_blocks >= kSampledBlocks;
  const Pieces pieces(n_blocks, slots, guess);
  Job job(search, search.k, prepared.view(), capacity);
  std::vector<std::unique_ptr<Found>> found(static_cast<size_t>(slots));
  const auto kernel = FASTDIFF_PICK_ALL(topk_scan);
  const auto scan_pieces = [&](bool sample) {
    std::atomic<int64_t> next{0};
    const int64_t n_pieces = sample ? pieces.of_sample() : pieces.of_rest();
    parallel(slots, slots, [&](int64_t task) {
      auto& mine = found[static_cast<size_t>(task)];
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < n_pieces;) {
        if (mine == nullptr) mine = std::make_unique<Found>(job);
        for (int64_t q = 0; q < n; q++) mine->floor[q] = std::max(mine->floor[q], job.floors.get(q));
        const auto run = [&](int64_t first, int64_t last) {
          ScanArgs args;
          args.table = way.table;
          args.product = way.product;
          args.some = way.some == nullptr ? nullptr : way.some->data();
          args.n_some = way.some == nullptr ? 0 : static_cast<int64_t>(way.some->size());
          args.queries = job.queries;
          args.allowed = way.some != nullptr || allowed.bits.empty() ? nullptr : allowed.bits.data();
          args.denied = denied.get();
          args.first_block = first;
          args.last_block = last;
          args.slot = &mine->slot;
          kernel(args);
        };
        if (sample) {
          pieces.run_sample(piece, run);
        } else {
          pieces.run_rest(piece, run);
        }
      }
    });
  };
  const auto lows = [&](int64_t q, std::vector<float>& low) {
    low.clear();
    for (const auto& slot : found) {
      if (slot == nullptr) continue;
      const Kept& kept = slot->kept[static_cast<size_t>(q)];
      low.insert(low.end(), kept.low, kept.low + kept.count);
    }
    return static_cast<int64_t>(low.size());
  };
  std::vector<float> guesses;
  if (guess) {
    const double expected = static_cast<double>(search.k) / kStride;
    job.k = static_cast<int64_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
    scan_pieces(true);
    guesses.assign(static_cast<size_t>(n), -kInfinity);
    std::vector<float> low;
    for (int64_t q = 0; q < n; q++) {
      if (lows(q, low) < job.k || job.given_up[static_cast<size_t>(q)].load(std::memory_order_relaxed)) continue;
      guesses[static_cast<size_t>(q)] =
          job.floors.raise(q, job.floor_of(low.data(), static_cast<int64_t>(low.size()), job.k));
    }
    job.k = search.k;
  }
  scan_pieces(false);

  std::atomic<int64_t> rescored{0};
  std::vector<char> wrong(static_cast<size_t>(n), 0);
  const int64_t per_task = std::max<int64_t>(1, std::min<int64_t>(16, n / (4 * slots)));
  parallel(slots, (n + per_task - 1) / per_task, [&](int64_t task) {
    Rescoring best(search);
    std::vector<float> low;
    std::vector<int32_t> rows;
    for (int64_t q = task * per_task; q < std::min(n, (task + 1) * per_task); q++) {
      if (job.given_up[static_cast<size_t>(q)].load(std::memory_order_relaxed)) continue;
      float floor = job.floors.get(q);
      const int64_t n_kept = lows(q, low);
      if (guess && guesses[static_cast<size_t>(q)] > -kInfinity) {
        const float guessed = guesses[static_cast<size_t>(q)];
        if (std::count_if(low.begin(), low.end(), [&](float score) { return score >= guessed; }) < search.k) {
          wrong[static_cast<size_t>(q)] = 1;
          continue;
        }
      }
      if (n_kept > search.k) floor = std::max(floor, job.floor_of(low.data(), n_kept, search.k));
      rows.clear();
      for (const auto& slot : found) {
        if (slot == nullptr) continue;
        const Kept& kept = slot->kept[static_cast<size_t>(q)];
        for (int64_t i = 0; i < kept.count; i++) {
          if (kept.high[i] >= floor) rows.push_back(kept.row[i]);
        }
      }
      best.write_of(which[static_cast<size_t>(q)], rows);
      rescored.fetch_add(static_cast<int64_t>(rows.size()), std::memory_order_relaxed);
    }
  });
  report.rescored += rescored.load();
  Left left;
  for (int64_t q = 0; q < n; q++) {
    if (wrong[static_cast<size_t>(q)]) left.guessed_wrong.push_back(which[static_cast<size_t>(q)]);
    if (job.given_up[static_cast<size_t>(q)].load()) left.too_many.push_back(which[static_cast<size_t>(q)]);
  }
  return left;
}

// The same for any number of queries, as many at a time as the buffers may hold. Returns those without an answer.
std::vector<int64_t> scan_all(const Search& search, const Way& way, const Allowed& allowed,
                              const std::vector<int64_t>& which, double largest_norm, bool guess, Report& report) {
  const int64_t k = std::min(search.k, search.scan.n_rows);
  const int64_t capacity = (way.table.stored == Stored::int8 ? 2 * k : k) + std::max<int64_t>(k / 2, 156);
  const int64_t each = search.threads * kept_bytes(capacity);
  std::vector<int64_t> again, left, some;
  int64_t bytes = 0;
  for (size_t i = 0; i < which.size(); i++) {
    some.push_back(which[i]);
    bytes += each + DeniedRows::bytes_for(search, which[i]);
    const bool last = i + 1 == which.size();
    if (!last && bytes + each + DeniedRows::bytes_for(search, which[i + 1]) <= kBufferBytes) continue;
    const Left more = scan(search, way, allowed, some, capacity, largest_norm, guess, report);
    again.insert(again.end(), more.guessed_wrong.begin(), more.guessed_wrong.end());
    left.insert(left.end(), more.too_many.begin(), more.too_many.end());
    some.clear();
    bytes = 0;
  }
  if (!again.empty()) {
    report.guessed_wrong += static_cast<int64_t>(again.size());
    const std::vector<int64_t> more = scan_all(search, way, allowed, again, largest_norm, false, report);
    left.insert(left.end(), more.begin(), more.end());
  }
  return left;
}

// --- few queries of a small table
// -------------------------------------------------------------------------------------

// One thread's work: to wake another takes longer.
void scan_small(const Search& search, const Way& way, const Allowed& allowed, const std::vector<int64_t>& which,
                double largest_norm, Report& report) {
  const Prepared prepared(search, which, way.product, way.table.stored, way.residual, largest_norm);
  const int64_t padded = round_up(way.table.n_rows, kStretch), n_groups = padded / 16, dim = way.table.dim;
  float* const memory = scratch(2 * padded + 2 * n_groups + kBlock * dim);
  RowsArgs args;
  args.table = way.table;
  args.product = way.product;
  args.queries = prepared.view();
  args.allowed = allowed.bits.empty() ? nullptr : allowed.bits.data();
  args.scores = memory;
  args.rows = reinterpret_cast<int32_t*>(memory + padded);
  args.low = memory + 2 * padded;
  args.scratch = args.low + 2 * n_groups;
  float* const some = args.low + n_groups;
  std::vector<uint64_t> keys;
  for (size_t i = 0; i < which.size(); i++) {
    args.query = static_cast<int64_t>(i);
    FASTDIFF_PICK_ALL(topk_row_scores)(args);
    if (search.exclude.offsets != nullptr) {
      for (int64_t at = search.exclude.offsets[which[i]]; at < search.exclude.offsets[which[i] + 1]; at++) {
        args.scores[search.exclude.values[at]] = -kInfinity;
      }
    }
    FASTDIFF_PICK_ALL(topk_row_floors)(args);
    int64_t n_some = 0;
    const int64_t apart = n_groups >= 32 * search.k ? n_groups / 4 : n_groups;  // where there are plenty, four in one
    for (int64_t group = 0; group < apart; group++) {
      float low = args.low[group];
      for (int64_t other = group + apart; other < n_groups; other += apart) low = std::max(low, args.low[other]);
      some[n_some] = low;
      n_some += low > -kInfinity;
    }
    const float floor = n_some < search.k ? -kInfinity : FASTDIFF_PICK(topk_floor)(some, n_some, search.k);
    const int64_t n = FASTDIFF_PICK_ALL(topk_rows_reaching)(args, floor);
    ExactArgs exact;
    exact.query = search.queries + which[i] * dim;
    exact.items = search.items.chunks[0];
    exact.row_bytes = search.items.row_bytes;
    exact.dim = dim;
    exact.rows = args.rows;
    exact.first = 0;
    exact.n = n;
    exact.scores = args.scores;
    exact.scratch = args.scratch;
    FASTDIFF_PICK(topk_exact)(exact);
    keys.resize(static_cast<size_t>(n));
    for (int64_t j = 0; j < n; j++) {
      keys[static_cast<size_t>(j)] = to_key(args.scores[j], static_cast<uint32_t>(args.rows[j]));
    }
    best_first(keys, search.k);
    write(keys, search.k, search.rows + which[i] * search.k, search.scores + which[i] * search.k);
    report.rescored += n;
  }
}

// --- by the definition
// ------------------------------------------------------------------------------------------------

// Adds the rows first .. last - 1 that may be given to a query, keeping only what can be among its k best.
class Best {
 public:
  explicit Best(const Search& search) : search_(search), scratch_(16 * search.scan.dim) {
    limit_ = static_cast<size_t>(std::min(search.scan.n_rows, 2 * std::min(search.k, search.scan.n_rows) + 8192));
  }

  void add(int64_t query, const Denied* denied, const Allowed& allowed, int64_t first, int64_t last) {
    constexpr int64_t kStep = 1024;
    float scores[kStep];
    const auto exact = FASTDIFF_PICK(topk_exact);
    for (int64_t at = first; at < last; at += kStep) {
      ExactArgs args;
      args.query = search_.queries + query * search_.scan.dim;
      args.items = search_.items.chunks[0];
      args.row_bytes = search_.items.row_bytes;
      args.dim = search_.scan.dim;
      args.rows = nullptr;
      args.first = at;
      args.n = std::min(kStep, last - at);
      args.scores = scores;
      args.scratch = scratch_.get();
      exact(args);
      for (int64_t i = 0; i < args.n; i++) {
        const uint64_t key = to_key(scores[i], static_cast<uint32_t>(at + i));
        if (key < floor_ || !allowed.has(at + i)) continue;
        if (denied != nullptr && denied->places != nullptr && denied->has(static_cast<uint32_t>(at + i))) continue;
        if (keys.size() == limit_) shrink();
        if (key >= floor_) keys.push_back(key);
      }
    }
  }

  std::vector<uint64_t> keys;

 private:
  void shrink() {
    std::nth_element(keys.begin(), keys.begin() + search_.k - 1, keys.end(),
                     [](uint64_t a, uint64_t b) { return a > b; });
    keys.resize(static_cast<size_t>(search_.k));
    floor_ = keys.back();
  }

  const Search& search_;
  Aligned<float> scratch_;
  uint64_t floor_ = 0;
  size_t limit_;
};

void by_definition(const Search& search, const Allowed& allowed, const std::vector<int64_t>& which) {
  const int64_t n = static_cast<int64_t>(which.size()), n_rows = search.scan.n_rows, threads = search.threads;
  const bool worth_threads = n * n_rows * search.scan.dim > 100000;
  // few queries: several threads for each
  const int64_t parts =
      !worth_threads || n >= 2 * threads ? 1 : std::min<int64_t>(threads, std::max<int64_t>(1, n_rows / 1024));
  const int64_t at_once = std::max<int64_t>(1, std::min(n, 4 * threads));
  for (int64_t start = 0; start < n; start += at_once) {
    const std::vector<int64_t> some(which.begin() + start, which.begin() + std::min(n, start + at_once));
    const DeniedRows denied(search, some);
    const int64_t here = static_cast<int64_t>(some.size());
    std::vector<std::vector<uint64_t>> found(static_cast<size_t>(here * parts));
    parallel(worth_threads ? search.threads : 1, here * parts, [&](int64_t task) {
      const int64_t i = task / parts, part = task % parts;
      Best best(search);
      const int64_t per_part = round_up((n_rows + parts - 1) / parts, 16), first = part * per_part;
      best.add(some[static_cast<size_t>(i)], denied.get() == nullptr ? nullptr : denied.get() + i, allowed, first,
               std::min(n_rows, first + per_part));
      best_first(best.keys, search.k);
      if (parts == 1) {
        const int64_t query = some[static_cast<size_t>(i)];
        write(best.keys, search.k, search.rows + query * search.k, search.scores + query * search.k);
      } else {
        found[static_cast<size_t>(task)] = std::move(best.keys);
      }
    });
    if (parts == 1) continue;
    for (int64_t i = 0; i < here; i++) {
      std::vector<uint64_t>& keys = found[static_cast<size_t>(i * parts)];
      for (int64_t part = 1; part < parts; part++) {
        std::vector<uint64_t>& more = found[static_cast<size_t>(i * parts + part)];
        keys.insert(keys.end(), more.begin(), more.end());
        std::vector<uint64_t>().swap(more);
      }
      best_first(keys, search.k);
      const int64_t query = some[static_cast<size_t>(i)];
      write(keys, search.k, search.rows + query * search.k, search.scores + query * search.k);
      std::vector<uint64_t>().swap(keys);
    }
  }
}

// Only the rows listed, each once.
void of_candidates(const Search& search, const Allowed& allowed) {
  const int64_t n = search.n_queries, total = search.candidates.offsets[n];
  const int64_t per_task = std::max<int64_t>(1, n / 64);
  const int threads = total * search.scan.dim > 50000 ? search.threads : 1;
  parallel(threads, (n + per_task - 1) / per_task, [&](int64_t task) {
    Rescoring best(search);
    std::vector<int32_t> rows;
    for (int64_t query = task * per_task; query < std::min(n, (task + 1) * per_task); query++) {
      const DeniedRows denied(search, {query});
      const Denied* none = denied.get();
      rows.clear();
      for (int64_t i = search.candidates.offsets[query]; i < search.candidates.offsets[query + 1]; i++) {
        const int64_t row = search.candidates.values[i];
        if (!allowed.has(row)) continue;
        if (none != nullptr && none->places != nullptr && none->has(static_cast<uint32_t>(row))) continue;
        rows.push_back(static_cast<int32_t>(row));
      }
      std::sort(rows.begin(), rows.end());
      rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
      best.write_of(query, rows);
    }
  });
}

void check_lists(const char* name, const Lists& lists, int64_t n_queries, int64_t n_rows) {
  if (lists.offsets == nullptr) return;
  const int64_t total = lists.offsets[n_queries];
  uint64_t largest = 0;
  for (int64_t i = 0; i < total; i++) largest = std::max(largest, static_cast<uint64_t>(lists.values[i]));
  if (largest < static_cast<uint64_t>(n_rows)) return;
  const auto bounds = std::minmax_element(lists.values, lists.values + total);
  fail("score_topk: ", name, " must hold rows 0..", n_rows - 1, " (got ",
       *bounds.first < 0 ? *bounds.first : *bounds.second, ")");
}

}  // namespace

void search(const Search& search, Report* report) {
  Report ignored;
  Report& counts = report == nullptr ? ignored : *report;
  const int64_t n = search.n_queries, n_rows = search.scan.n_rows, dim = search.scan.dim;
  check_lists("user_exclude", search.exclude, n, n_rows);
  check_lists("user_candidates", search.candidates, n, n_rows);
  if (n == 0 || n_rows == 0) {
    std::fill(search.rows, search.rows + n * search.k, -1);
    std::fill(search.scores, search.scores + n * search.k, -kInfinity);
    return;
  }
  const int64_t n_blocks = (n_rows + kBlock - 1) / kBlock;
  float largest_norm = 0.0f;
  for (int64_t block = 0; block < n_blocks; block++)
    largest_norm = std::max(largest_norm, search.scan.bounds[block].norm);

  std::vector<int64_t> in_range, out_of_range;
  for (int64_t query = 0; query < n; query++) {
    const float* at = search.queries + query * dim;
    double sum = 0.0;
    for (int64_t i = 0; i < dim; i++) sum += static_cast<double>(at[i]) * static_cast<double>(at[i]);
    if (!(sum <= std::numeric_limits<double>::max())) {
      fail("score_topk: query must be finite (got NaN or infinity in query[", query, "]); check the model's weights");
    }
    const double size = std::max(std::sqrt(sum), 1.0) * std::max(static_cast<double>(largest_norm), 1.0);
    (size < kLargest ? in_range : out_of_range).push_back(query);
  }

  const Allowed allowed(search);
  if (search.candidates.offsets != nullptr) return of_candidates(search, allowed);
  if (n_rows <= kFewRows || search.k > n_rows / 8 || dim > kWidest) {
    in_range.insert(in_range.end(), out_of_range.begin(), out_of_range.end());
    counts.by_definition += n;
    return by_definition(search, allowed, in_range);
  }

  // where few rows are allowed, only those are read; they are gathered as float32, which no scale of a block concerns
  std::vector<int32_t> few;
  Table items = search.items;
  items.bounds = search.scan.bounds;
  const bool gather = 4 * allowed.count <= n_rows;
  if (gather) few = allowed.rows();
  const Table& table = gather ? items : search.scan;
  const int64_t n_scanned = static_cast<int64_t>(in_range.size());
  const bool small = n_rows <= kSmallTable && n_rows * table.row_bytes <= kSmallBytes && !gather;
  const Few few_queries = n_scanned > kFewQueries ? Few::no : small ? Few::queries_of_small_table : Few::queries;
  const Product product = product_for(table, few_queries);
  const bool residual = search.scan.stored != Stored::int8 || table.stored == Stored::int8;
  const Way first{table, product, residual, gather ? &few : nullptr};
  std::vector<int64_t> left;
  if (few_queries == Few::queries_of_small_table) {
    scan_small(search, first, allowed, in_range, largest_norm, counts);
  } else {
    left = scan_all(search, first, allowed, in_range, largest_norm, true, counts);
  }
  counts.scanned += static_cast<int64_t>(in_range.size());
  if (!left.empty() && !(product == Product::float32 && table.stored == Stored::float32)) {
    const Way second{items, Product::float32, residual, gather ? &few : nullptr};
    counts.scanned_again += static_cast<int64_t>(left.size());
    left = scan_all(search, second, allowed, left, largest_norm, true, counts);
  }
  left.insert(left.end(), out_of_range.begin(), out_of_range.end());
  counts.by_definition += static_cast<int64_t>(left.size());
  if (!left.empty()) by_definition(search, allowed, left);
}

void pack(const char* items, int64_t row_bytes, int64_t dim, int64_t n_rows, Stored stored, char* rows, Bound* bounds,
          int threads) {
  const auto kernel = FASTDIFF_PICK(topk_pack);
  const int64_t element = stored == Stored::int8 ? 1 : 2;
  const int64_t per_task = round_up(std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, dim)), kBlock);
  parallel(threads, (n_rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task;
    PackArgs args;
    args.items = items + first * row_bytes;
    args.row_bytes = row_bytes;
    args.dim = dim;
    args.n_rows = std::min(per_task, n_rows - first);
    args.stored = stored;
    args.rows = rows == nullptr ? nullptr : rows + first * dim * element;
    args.bounds = bounds + first / kBlock;
    kernel(args);
  });
}

}  // namespace topk
}  // namespace fastdiff
