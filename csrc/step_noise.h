// The draws of a sampler as the op wrappers get them: given as a tensor, or made inside from Philox counters.
#pragma once

#include "tensors.h"

namespace fastdiff {

class StepNoise {
 public:
  // noise [any, rows, dim], the draw of step i at place i; row_key and sample [rows], both or neither.
  StepNoise(const char* op, const MaybeTensor& noise, const MaybeTensor& row_key, const MaybeTensor& sample,
            int64_t rows, int64_t dim)
      : op_(op) {
    FASTDIFF_CHECK(row_key.has_value() == sample.has_value(), op, ": row_key and sample go together; give both or none");
    if (noise.has_value()) given_ = floats(op, "noise", *noise, {-1, rows, dim});
    if (!row_key.has_value()) return;
    keys_ = checked(op, "row_key", *row_key, ScalarType::Long, {rows});
    samples_ = checked(op, "sample", *sample, ScalarType::Long, {rows});
  }

  // Fails where one of the steps has a factor c_noise(i) that is not 0, and no draw.
  template <class Factor>
  void check_steps(int64_t steps, const Factor& c_noise) const {
    if (keyed()) return;
    const int64_t held = given_.has_value() ? given_->size(0) : 0;
    for (int64_t i = held; i < steps; i++) {
      FASTDIFF_CHECK(c_noise(i) == 0.0, op_, ": noise must hold a draw for step ", i, " (got ", held, " draws)");
    }
  }

  bool keyed() const { return keys_.has_value(); }

  // Null where they are not given.
  const float* given() const { return given_.has_value() ? data<float>(*given_) : nullptr; }
  const int64_t* row_key() const { return keyed() ? data<int64_t>(*keys_) : nullptr; }
  const int64_t* sample() const { return keyed() ? data<int64_t>(*samples_) : nullptr; }

 private:
  const char* op_;
  MaybeTensor given_, keys_, samples_;
};

}  // namespace fastdiff
