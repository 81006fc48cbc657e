#include "sampler_step.h"

#include "../tensors.h"
#include "thread_pool.h"

namespace fastdiff {
namespace {

Tensor sampler_step(const Tensor& model_output, const Tensor& x_t, const MaybeTensor& noise, double c_out, double c_xt,
                    double c_noise, bool normalize) {
  constexpr const char* op = "sampler_step";
  const Tensor output = floats(op, "model_output", model_output, {-1, -1});
  const int64_t rows = output.size(0), dim = output.size(1);
  const Tensor x = floats(op, "x_t", x_t, {rows, dim});
  FASTDIFF_CHECK(noise.has_value() || c_noise == 0.0, op, ": noise must be given where c_noise is not 0");
  const Tensor draws = noise.has_value() ? floats(op, "noise", *noise, {rows, dim}) : output;
  Tensor result = empty_like_with(output, {rows, dim}, ScalarType::Float);

  const int64_t per_task = 1 + (1 << 14) / (dim + 1);
  const auto kernel = FASTDIFF_PICK(sampler_step);
  parallel(num_threads(), (rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task, at = first * dim;
    kernel({data<float>(output) + at, data<float>(x) + at, noise.has_value() ? data<float>(draws) + at : nullptr,
            mutable_data<float>(result) + at, std::min(per_task, rows - first), dim, static_cast<float>(c_out),
            static_cast<float>(c_xt), static_cast<float>(c_noise), normalize});
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("sampler_step", TORCH_BOX(&sampler_step)); }

}  // namespace fastdiff
