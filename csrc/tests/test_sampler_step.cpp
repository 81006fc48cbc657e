// sampler_step against the formula in double, over sizes that fill and do not fill vectors, at every level.
#include "../cpu/sampler_step.h"
#include "check.h"

namespace fastdiff {
namespace tests {
namespace {

struct Coef {
  float out, xt, noise;
};

void compare(int64_t rows, int64_t dim, const Coef& coef, bool normalize, bool in_place) {
  Draws draws(static_cast<uint64_t>(rows * 1000 + dim));
  const std::vector<float> output = draws.normals(rows * dim), noise = draws.normals(rows * dim);
  std::vector<float> x_t = draws.normals(rows * dim);
  std::vector<double> want(x_t.size());
  for (int64_t row = 0; row < rows; row++) {
    double squares = 0;
    for (int64_t i = row * dim; i < (row + 1) * dim; i++) {
      want[i] = static_cast<double>(coef.out) * output[i] + static_cast<double>(coef.xt) * x_t[i] +
                static_cast<double>(coef.noise) * noise[i];
      squares += want[i] * want[i];
    }
    const double norm = std::fmax(std::sqrt(squares), 1e-12);
    for (int64_t i = row * dim; normalize && i < (row + 1) * dim; i++) want[i] /= norm;
  }
  if (coef.xt == 0.0f && !in_place) std::fill(x_t.begin(), x_t.end(), kNaN);  // not looked at
  std::vector<float> apart(x_t.size(), kNaN);
  std::vector<float>& x_prev = in_place ? x_t : apart;
  FASTDIFF_PICK(sampler_step)
  ({output.data(), x_t.data(), coef.noise == 0.0f ? nullptr : noise.data(), x_prev.data(), rows, dim, coef.out, coef.xt,
    coef.noise, normalize});
  expect_close(x_prev, want, 1e-6, "sampler_step " + std::to_string(rows) + " x " + std::to_string(dim));
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff::tests;
  at_every_level([] {
    for (const Coef& coef :
         {Coef{0.3f, 0.9f, 0.2f}, Coef{1.0f, 0.0f, 0.0f}, Coef{1.0f, 0.0f, 0.1f}, Coef{-0.7f, 1.1f, 0.0f}}) {
      for (const int64_t dim : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 129}) {
        for (const int64_t rows : {0, 1, 3}) {
          for (const bool normalize : {false, true}) {
            compare(rows, dim, coef, normalize, false);
            compare(rows, dim, coef, normalize, true);
          }
        }
      }
    }
  });
  return 0;
}
