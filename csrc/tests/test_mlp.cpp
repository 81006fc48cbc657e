// The MLP loop and what stands around it (vectors' functions, Philox, row_linear, sample_affine, the encoders) against
// plain loops in double, over sizes that fill and do not fill vectors and panels, at every level and on several threads.
#include <thread>

#include "../cpu/denoise_mlp_loop.h"
#include "../cpu/denoise_mlp_loop_layout.h"
#include "../cpu/encode_interests.h"
#include "../cpu/encode_last_item.h"
#include "../cpu/philox_normals.h"
#include "../cpu/row_linear.h"
#include "../cpu/sample_affine.h"
#include "../cpu/vecmath.h"
#include "layers.h"

namespace fastdiff {
namespace tests {
namespace {

// --- functions, as this file's own level has them ---------------------------------------------------------------------

template <class Ours, class Truth>
void follows(const char* name, double low, double high, double ulps, const Ours& ours, const Truth& truth) {
  constexpr int kPoints = 20011;
  using namespace fastdiff::FASTDIFF_LEVEL;
  for (int i = 0; i < kPoints; i++) {
    const float x = static_cast<float>(low + (high - low) * i / (kPoints - 1));
    float lanes[kLanes], results[kLanes];
    for (int lane = 0; lane < kLanes; lane++) lanes[lane] = lane == i % kLanes ? x : 0.5f;
    store(results, ours(load(lanes)));
    const float got = results[i % kLanes];
    const double want = truth(static_cast<double>(x));
    const float magnitude = std::fabs(static_cast<float>(want));
    const double ulp = static_cast<double>(std::nextafter(magnitude, std::numeric_limits<float>::infinity())) - magnitude;
    EXPECT(std::fabs(got - want) <= ulps * ulp, name, "(", x, ") is ", got, ", not ", want);
    for (int lane = 0; lane < kLanes; lane++) lanes[lane] = x;  // the same bits at every position
    store(results, ours(load(lanes)));
    for (int lane = 0; lane < kLanes; lane++) EXPECT(results[lane] == got, name, "(", x, ") in lane ", lane);
  }
}

void functions() {
  using namespace fastdiff::FASTDIFF_LEVEL;
  const auto gelu_of = [](double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); };
  const auto gelu_tanh_of = [](double x) {
    return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979) * (x + 0.044715 * x * x * x)));
  };
  const auto silu_of = [](double x) { return x / (1.0 + std::exp(-x)); };
  follows("exp", -87.0, 88.0, 2.0, [](Vec x) { return exp(x); }, [](double x) { return std::exp(x); });
  follows("log", 1e-6, 3.0, 2.0, [](Vec x) { return log(x); }, [](double x) { return std::log(x); });
  follows("log", 1.0, 1e7, 2.0, [](Vec x) { return log<24>(x); }, [](double x) { return std::log(x * 0x1p-24); });
  follows("tanh", -11.0, 11.0, 2.0, [](Vec x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  follows("erf", -5.0, 5.0, 2.5, [](Vec x) { return erf(x); }, [](double x) { return std::erf(x); });
  follows("sigmoid", -80.0, 80.0, 3.0, [](Vec x) { return sigmoid(x); }, [](double x) { return 1.0 / (1.0 + std::exp(-x)); });
  follows("silu", -80.0, 80.0, 3.0, [](Vec x) { return silu(x); }, silu_of);
  follows("gelu", -1.0, 6.0, 4.0, [](Vec x) { return gelu(x); }, gelu_of);
  follows("gelu_tanh", -1.0, 6.0, 6.0, [](Vec x) { return gelu_tanh(x); }, gelu_tanh_of);
  for (double x = -14.0; x < -1.0; x += 0.013) {  // the left tails, by their absolute error
    float lanes[kLanes];
    store(lanes, gelu(set1(static_cast<float>(x))));
    EXPECT(std::fabs(lanes[0] - gelu_of(static_cast<float>(x))) <= 0x1p-23, "gelu(", x, ")");
    store(lanes, gelu_tanh(set1(static_cast<float>(x))));
    EXPECT(std::fabs(lanes[0] - gelu_tanh_of(static_cast<float>(x))) <= 0x1p-23, "gelu_tanh(", x, ")");
  }
  for (double x = 0.0; x <= 6.2831853; x += 0.00037) {
    Vec sine, cosine;
    float lanes[kLanes];
    const float angle = static_cast<float>(x);
    sincos(set1(angle), sine, cosine);
    store(lanes, sine);
    EXPECT(std::fabs(lanes[0] - std::sin(static_cast<double>(angle))) <= 2.0 * 0x1p-24, "sin(", x, ")");
    store(lanes, cosine);
    EXPECT(std::fabs(lanes[0] - std::cos(static_cast<double>(angle))) <= 2.0 * 0x1p-24, "cos(", x, ")");
  }
  float nans[kLanes];
  for (const auto f : {+[](Vec x) { return exp(x); }, +[](Vec x) { return tanh(x); }, +[](Vec x) { return gelu(x); },
                       +[](Vec x) { return silu(x); }, +[](Vec x) { return relu(x); }, +[](Vec x) { return erf(x); }}) {
    store(nans, f(set1(kNaN)));
    EXPECT(std::isnan(nans[0]), "NaN must come out as NaN");
  }
}

// --- Philox -----------------------------------------------------------------------------------------------------------

double philox_normal(uint64_t seed, int64_t row_key, int64_t sample, uint32_t draw, int dim) {
  const uint64_t key = static_cast<uint64_t>(row_key);
  uint32_t c[4] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), draw,
                   static_cast<uint32_t>(sample << 16) | static_cast<uint32_t>(dim / 4)};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, c2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = c0, c[1] = static_cast<uint32_t>(p1), c[2] = c2, c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint32_t a = c[dim % 4 / 2 * 2], b = c[dim % 4 / 2 * 2 + 1];
  const double radius = std::sqrt(-2.0 * std::log(((a >> 8) + 1.0) * 0x1p-24));
  const double angle = static_cast<double>(6.2831855f * (static_cast<float>(b >> 8) * 0x1p-24f));
  return radius * (dim % 2 ? std::sin(angle) : std::cos(angle));
}

struct Keys {
  std::vector<int64_t> row_key, sample;

  Keys(Draws& draws, int rows) {
    for (int row = 0; row < rows; row++) {
      row_key.push_back(static_cast<int64_t>(draws.word()));
      sample.push_back(draws.below(1 << 16));
    }
  }
};

void philox(int rows, int dim) {
  Draws draws(static_cast<uint64_t>(rows * 1000 + dim));
  const Keys keys(draws, rows);
  const uint64_t seed = draws.word();
  Floats normals(static_cast<size_t>(rows) * dim, kNaN);
  Row want(normals.size());
  const uint32_t draw = 0xFFFFFFFFu - static_cast<uint32_t>(dim);
  FASTDIFF_PICK(philox_normals)({seed, keys.row_key.data(), keys.sample.data(), draw, rows, dim, normals.data()});
  for (int row = 0; row < rows; row++) {
    for (int i = 0; i < dim; i++) want[row * dim + i] = philox_normal(seed, keys.row_key[row], keys.sample[row], draw, i);
  }
  expect_close(normals, want, 1e-6, "philox_normals " + std::to_string(rows) + " x " + std::to_string(dim));
}

// --- layers ----------------------------------------------------------------------------------------------------------

void one_layer(int64_t rows, int64_t n_in, int64_t n_out) {
  Draws draws(static_cast<uint64_t>(rows * 10000 + n_in * 100 + n_out));
  const Dense layer(draws, n_in, n_out);
  Floats packed, bias;
  pack(packed, layer.weight, n_in, n_out);
  pack(bias, layer.bias);
  const Floats x = draws.normals(rows * n_in);
  Floats y(static_cast<size_t>(rows * n_out), kNaN), scratch(static_cast<size_t>(kLinearRows * up(n_out)), kNaN);
  FASTDIFF_PICK(row_linear)({x.data(), packed.data(), bias.data(), rows, static_cast<int>(n_in), static_cast<int>(n_out),
                             n_out % 16 ? scratch.data() : nullptr, y.data()});
  Row want;
  for (int64_t row = 0; row < rows; row++) {
    for (const double value : layer(row_of(x, row, n_in))) want.push_back(value);
  }
  expect_close(y, want, 2e-6, "row_linear");
}

void affine(int rows, int dim, bool given, bool guided) {
  Draws draws(static_cast<uint64_t>(rows * 1000 + dim));
  const Dense gain(draws, dim, dim), factor(draws, dim, dim);
  Floats packed;
  pack(packed, gain);
  pack(packed, factor.weight, dim, dim);
  const Floats cond = draws.normals(rows * dim), z = draws.normals(rows * dim), uncond = draws.normals(dim);
  const Keys keys(draws, rows);
  Floats x_0(static_cast<size_t>(rows * dim), kNaN);
  Floats scratch(static_cast<size_t>(affine_scratch(dim)), kNaN);
  FASTDIFF_PICK(sample_affine)({packed.data(), cond.data(), guided ? uncond.data() : nullptr, 0, 1.7f,
                                given ? z.data() : nullptr, 17, keys.row_key.data(), keys.sample.data(), rows, dim,
                                scratch.data(), x_0.data()});
  Row want;
  for (int row = 0; row < rows; row++) {
    Row draw = row_of(z, row, dim);
    for (int i = 0; !given && i < dim; i++) draw[i] = philox_normal(17, keys.row_key[row], keys.sample[row], 0, i);
    Row c = row_of(cond, row, dim);
    for (int i = 0; guided && i < dim; i++) c[i] = uncond[i] + 1.7 * (c[i] - uncond[i]);
    const Row a = gain(c), b = factor(draw, false);
    for (int i = 0; i < dim; i++) want.push_back(a[i] + b[i]);
  }
  expect_close(x_0, want, 3e-6, "sample_affine");
}

// --- the loop ---------------------------------------------------------------------------------------------------------

struct Loop {
  int rows, dim;
  std::vector<int64_t> hidden;
  int activation;
  bool norm, guided, shared, normalize, given, start;
  int64_t steps;
  bool before = false;  // put on the sphere before each step
};

double activate(int activation, double x) {
  if (activation == kGelu) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  if (activation == kRelu) return x > 0 ? x : 0.0;
  if (activation == kSilu) return x / (1.0 + std::exp(-x));
  return std::tanh(x);
}

void loop(const Loop& c) {
  Draws draws(static_cast<uint64_t>(c.rows * 100 + c.dim));
  std::vector<int64_t> widths{c.dim};
  widths.insert(widths.end(), c.hidden.begin(), c.hidden.end());
  widths.push_back(c.dim);
  const int layers = static_cast<int>(widths.size()) - 2;
  const int64_t h = widths[1];
  const Dense first(draws, c.dim, h);
  std::vector<Dense> further;
  Floats packed;
  pack_inputs(packed, first.weight, c.dim, h, 0, mlp_split(c.dim));
  pack_inputs(packed, first.weight, c.dim, h, mlp_split(c.dim), c.dim);
  for (int i = 0; i < layers; i++) {
    further.emplace_back(draws, widths[i + 1], widths[i + 2]);
    pack(packed, further.back());
  }
  const Norm norm(draws, c.dim);
  if (c.norm) pack(packed, norm);
  const Floats x_t = draws.normals(c.rows * c.dim), cond = draws.normals(c.rows * h), time = draws.normals(c.steps * h);
  const Floats uncond = draws.normals((c.shared ? 1 : c.rows) * h);
  const Floats noise = draws.normals(c.steps * c.rows * c.dim);
  const Keys keys(draws, c.rows);
  Row coef;
  Floats table;
  for (int64_t i = 0; i < c.steps; i++) {
    for (const double scale : {0.5, 0.4, 0.3}) coef.push_back(scale * draws.uniform());
    if (i % 5 == 3 || i == c.steps - 1) coef.back() = 0.0;
    Floats factors(kMlpFactors, 0.0f);
    for (int j = 0; j < 3; j++) factors[j] = static_cast<float>(coef[3 * i + j]);
    factors[kSphereBefore] = c.before ? 1.0f : 0.0f;
    factors[kSphereAfter] = c.normalize ? 1.0f : 0.0f;
    table.insert(table.end(), factors.begin(), factors.end());
    pack(table, Floats(time.begin() + i * h, time.begin() + (i + 1) * h));
  }

  Floats x_0(static_cast<size_t>(c.rows * c.dim), kNaN);
  const MlpLayout layout = mlp_layout(widths.data(), layers, c.rows, c.guided, c.steps, kMlpNoise);
  Floats scratch(static_cast<size_t>(layout.total), kNaN);
  MlpLoopArgs args = {};
  args.weights = packed.data();
  for (size_t i = 0; i < widths.size(); i++) args.shape.widths[i] = widths[i];
  args.shape.layers = layers;
  args.shape.activation = c.activation;
  args.shape.norm_eps = c.norm ? 1e-5f : -1.0f;
  args.x_t = c.start ? x_t.data() : nullptr;
  args.cond = cond.data();
  args.uncond = c.guided ? uncond.data() : nullptr;
  args.uncond_step = c.shared ? 0 : h;
  args.guidance_scale = 1.7f;
  args.table = table.data();
  args.steps = c.steps;
  args.noise = c.given ? noise.data() : nullptr;
  args.noise_step = static_cast<int64_t>(c.rows) * c.dim;
  args.seed = 99;
  args.row_key = keys.row_key.data();
  args.sample = keys.sample.data();
  args.rows = c.rows;
  args.scratch = scratch.data();
  args.x_0 = x_0.data();
  FASTDIFF_PICK(denoise_mlp_loop)(args);

  Row want;
  for (int row = 0; row < c.rows; row++) {
    const auto draw = [&](int64_t number, int i) {
      return philox_normal(99, keys.row_key[row], keys.sample[row], static_cast<uint32_t>(number), i);
    };
    Row x = row_of(x_t, row, c.dim);
    for (int i = 0; !c.start && i < c.dim; i++) x[i] = draw(0, i);
    const auto onto_sphere = [&] {
      double squares = 0;
      for (const double value : x) squares += value * value;
      for (double& value : x) value /= std::fmax(std::sqrt(squares), 1e-12);
    };
    for (int64_t step = 0; step < c.steps; step++) {
      if (c.before) onto_sphere();
      const auto network = [&](const Floats& share, int64_t share_row) {
        Row y = first(x, false);
        for (int64_t i = 0; i < h; i++) y[i] += static_cast<double>(share[share_row * h + i]) + time[step * h + i];
        for (const Dense& layer : further) {
          for (double& value : y) value = activate(c.activation, value);
          y = layer(y);
        }
        return c.norm ? norm(y, 1e-5) : y;
      };
      Row output = network(cond, row);
      if (c.guided) {
        const Row null = network(uncond, c.shared ? 0 : row);
        for (int i = 0; i < c.dim; i++) output[i] = null[i] + 1.7 * (output[i] - null[i]);
      }
      for (int i = 0; i < c.dim; i++) {
        x[i] = coef[3 * step] * output[i] + coef[3 * step + 1] * x[i];
        if (coef[3 * step + 2] != 0.0) {
          x[i] += coef[3 * step + 2] * (c.given ? noise[(step * c.rows + row) * c.dim + i] : draw(1 + step, i));
        }
      }
      if (c.normalize) onto_sphere();
    }
    want.insert(want.end(), x.begin(), x.end());
  }
  expect_close(x_0, want, 2e-5, "denoise_mlp_loop of " + std::to_string(c.dim));
}

// --- the encoders -----------------------------------------------------------------------------------------------------

struct Histories {
  std::vector<int64_t> items, lengths;

  Histories(Draws& draws, int rows, int64_t places, int64_t table_rows) {
    for (int row = 0; row < rows; row++) {
      lengths.push_back(draws.below(places + 1));
      for (int64_t place = 0; place < places; place++) {
        items.push_back(place < lengths[row] ? draws.below(table_rows) : -12345);  // what stands behind is not read
      }
    }
  }
};

void encode(int rows, int dim, int64_t places, int outputs = 0) {
  Draws draws(static_cast<uint64_t>(rows * 1000 + dim));
  const int window = 9;
  const int64_t table_rows = 30, pad = 4;
  std::vector<Dense> layers;
  std::vector<Norm> norms;
  Floats packed;
  for (int i = 0; i < 4; i++) {
    layers.emplace_back(draws, dim, dim);
    pack(packed, layers.back());
  }
  if (outputs > 0) {
    layers.emplace_back(draws, dim, outputs);
    pack(packed, layers.back());
  }
  for (int i = 0; i < 4; i++) {
    norms.emplace_back(draws, dim);
    pack(packed, norms.back());
  }
  const Floats positions = draws.normals(window * dim), table = draws.normals(table_rows * dim);
  for (int place = 0; place < window; place++) {
    pack(packed, Floats(positions.begin() + place * dim, positions.begin() + (place + 1) * dim));
  }
  auto [items, lengths] = Histories(draws, rows, places, table_rows);
  Floats h(static_cast<size_t>(rows * (outputs > 0 ? outputs : dim)), kNaN);
  Floats scratch(static_cast<size_t>(encode_scratch(dim, places, outputs)), kNaN);
  const EncodeLastItemArgs args = {items.data(),  lengths.data(), places, table.data(),   table_rows, packed.data(),
                                   window,        dim,            outputs, pad,           1e-5f,      rows,
                                   scratch.data(), h.data()};
  EXPECT(FASTDIFF_PICK(encode_last_item)(args), "the items are rows of the table");

  Row want;
  for (int row = 0; row < rows; row++) {
    std::vector<Row> e;
    for (int64_t place = 0; place < lengths[row]; place++) {
      const int64_t item = items[row * places + place];
      Row here(static_cast<size_t>(dim), 0.0);
      for (int i = 0; item != pad && i < dim; i++) here[i] = static_cast<double>(table[item * dim + i] + positions[place * dim + i]);
      e.push_back(here);
    }
    const bool real = lengths[row] > 0 && items[row * places + lengths[row] - 1] != pad;
    const Row query = norms[0](e.empty() ? Row(dim, 0.0) : e.back(), 1e-5);
    const Row qk = layers[0](query);
    Row mixed(static_cast<size_t>(dim), 0.0);
    double total = 0, most = -1e300;
    Row logits;
    for (size_t j = 0; j < e.size(); j++) {
      logits.push_back(items[row * places + static_cast<int64_t>(j)] == pad ? -1e300 : 0.0);
      for (int i = 0; i < dim; i++) logits.back() += qk[i] * e[j][i];
      most = std::fmax(most, logits.back());
    }
    for (const double logit : logits) total += logit < -1e299 ? 0.0 : std::exp(logit - most);
    for (size_t j = 0; j < e.size(); j++) {
      if (logits[j] < -1e299) continue;
      for (int i = 0; i < dim; i++) mixed[i] += std::exp(logits[j] - most) / total * e[j][i];
    }
    Row y = layers[1](mixed);
    for (int i = 0; i < dim; i++) y[i] += query[i];
    const Row z = norms[1](y, 1e-5);
    Row out = layers[2](z);
    for (double& value : out) value = value > 0 ? value : 0.0;
    out = layers[3](out);
    for (int i = 0; i < dim; i++) out[i] += z[i];
    out = norms[2](out, 1e-5);
    if (!real) out.assign(static_cast<size_t>(dim), 0.0);
    out = norms[3](out, 1e-5);
    if (outputs > 0) out = layers[4](out);
    want.insert(want.end(), out.begin(), out.end());
  }
  expect_close(h, want, 1e-4, "encode_last_item of " + std::to_string(dim));
  if (places > 0 && rows > 0) {
    items[0] = table_rows;
    lengths[0] = places;
    EXPECT(!FASTDIFF_PICK(encode_last_item)(args), "an item beyond the table");
    items[0] = 0;
    lengths[0] = places + 1;
    EXPECT(!FASTDIFF_PICK(encode_last_item)(args), "a length beyond the places");
  }
}

void interests(int rows, int dim, int64_t places, int count, bool learned, bool positions_in_values) {
  Draws draws(static_cast<uint64_t>(rows * 1000 + dim + count));
  const int64_t window = 70, table_rows = 30, pad = 4, hidden = 2 * dim + 3;
  const Dense first(draws, dim, hidden), second(draws, hidden, count);
  const Floats positions = draws.normals(window * dim), table = draws.normals(table_rows * dim);
  Floats packed;
  pack(packed, first), pack(packed, second);
  for (int64_t place = 0; place < window; place++) {
    pack(packed, Floats(positions.begin() + place * dim, positions.begin() + (place + 1) * dim));
  }
  auto [items, lengths] = Histories(draws, rows, places, table_rows);
  Floats g(static_cast<size_t>(rows) * count * dim, kNaN);
  Floats scratch(static_cast<size_t>(interest_scratch(rows, places, dim, hidden, count)), kNaN);
  EncodeInterestsArgs args = {};
  args.items = items.data(), args.lengths = lengths.data(), args.places = places;
  args.table = table.data(), args.table_rows = table_rows, args.pad_id = pad;
  args.weights = learned ? packed.data() : nullptr, args.window = window;
  args.dim = dim, args.hidden = static_cast<int>(hidden), args.interests = count;
  args.positions_in_values = positions_in_values;
  args.rows = rows, args.scratch = scratch.data(), args.g = g.data();
  EXPECT(FASTDIFF_PICK(encode_interests)(args), "the items are rows of the table");

  Row want(g.size(), 0.0);
  for (int row = 0; row < rows; row++) {
    double* const of_row = want.data() + static_cast<int64_t>(row) * count * dim;
    Row totals(static_cast<size_t>(count), 0.0);
    for (int64_t place = 0; place < lengths[row]; place++) {
      const int64_t item = items[row * places + place], k = place - (lengths[row] - count);
      if (item == pad) continue;
      Row placed(static_cast<size_t>(dim));
      for (int i = 0; i < dim; i++) placed[i] = static_cast<double>(table[item * dim + i]) + positions[place * dim + i];
      Row weights(static_cast<size_t>(count), 0.0);
      if (learned) {
        Row inner = first(placed);
        for (double& value : inner) value = std::tanh(value);
        weights = second(inner);
        for (double& value : weights) value = std::exp(value);  // small enough to do without their maximum
      } else if (k >= 0) {
        weights[k] = 1.0;
      }
      for (int at = 0; at < count; at++) {
        totals[at] += weights[at];
        for (int i = 0; i < dim; i++) {
          of_row[at * dim + i] += weights[at] * (learned && positions_in_values ? placed[i] : table[item * dim + i]);
        }
      }
    }
    for (int at = 0; at < count; at++) {
      for (int i = 0; i < dim && totals[at] > 0; i++) of_row[at * dim + i] /= totals[at];
    }
  }
  expect_close(g, want, 1e-5, "encode_interests of " + std::to_string(dim));
  if (places > 0 && rows > 0) {
    lengths[0] = places;
    items[0] = table_rows;
    EXPECT(!FASTDIFF_PICK(encode_interests)(args), "an item beyond the table");
    items[0] = 0;
    lengths[0] = places + 1;
    EXPECT(!FASTDIFF_PICK(encode_interests)(args), "a length beyond the places");
  }
}

void everything() {
  for (const int dim : {1, 2, 3, 4, 5, 15, 16, 17, 31, 50, 63, 64, 65, 130}) {
    for (const int rows : {0, 1, 3, 17}) philox(rows, dim);
    for (const int rows : {1, 2, 24}) {
      for (const bool guided : {false, true}) affine(rows, dim, true, guided), affine(rows, dim, false, guided);
    }
    for (const int rows : {1, 5, 24}) {
      if (dim > 4) encode(rows, dim, 9), encode(rows, dim, 3, 2 * dim);
      interests(rows, dim, 9, 3, true, dim % 2 == 0);
      interests(rows, dim, 3, 5, false, false);
    }
    encode(2, dim, 0, 7);
    interests(2, dim, 0, 2, true, false);
    interests(3, dim, 60, 18, true, true);
    for (const int64_t n_out : {1, 16, 33, 64}) one_layer(1, dim, n_out), one_layer(53, dim, n_out);
    for (const int rows : {1, 2, 7, 12}) {
      for (const bool given : {false, true}) {
        loop({rows, dim, {}, kGelu, false, false, false, false, given, true, 11});
        loop({rows, dim, {}, kGelu, false, false, false, dim > 1, given, given, 6});
        loop({rows, dim, {2 * dim + 1}, kGelu, false, true, true, false, given, true, 4});
        loop({rows, dim, {7, 19}, kSilu, dim > 2, true, false, false, given, true, 3});
        loop({rows, dim, {20}, kTanh, false, false, false, false, given, true, 3});
        loop({rows, dim, {5}, kRelu, false, false, false, false, given, true, 1});
        if (dim > 1) loop({rows, dim, {}, kGelu, false, false, false, false, given, true, 5, true});
        if (dim > 1) loop({rows, dim, {9}, kGelu, false, true, true, false, given, given, 3, true});
      }
    }
  }
  loop({1, 64, {}, kGelu, false, false, false, false, false, false, 150});  // several stretches of noise
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff;
  using namespace fastdiff::tests;
  functions();
  at_every_level([] { everything(); });
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; i++) {
    threads.emplace_back([] {
      loop({12, 50, {33}, kGelu, false, true, true, false, false, false, 9});
      encode(24, 50, 9);
      interests(24, 50, 9, 4, true, true);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
