// What the op wrappers need of torch's stable ABI: checked, contiguous tensors and their pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "check.h"

namespace fastdiff {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using MaybeTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// As torch prints it, without its "torch.".
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "scalar type " + std::to_string(static_cast<int>(dtype));  // complex, quantized, float8 ..
  }
}

// A contiguous CPU tensor of the dtype and shape wanted; -1 in `shape` stands for any size.
inline Tensor checked(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                      std::initializer_list<int64_t> shape) {
  FASTDIFF_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  FASTDIFF_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), " (got ",
                 dtype_name(tensor.scalar_type()), ")");
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  const int64_t* const sizes = shape.begin();
  for (size_t i = 0; fits && i < shape.size(); i++) fits = sizes[i] < 0 || tensor.size(i) == sizes[i];
  if (!fits) {
    std::string wanted = "[";
    for (size_t i = 0; i < shape.size(); i++) wanted += (i ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
    fail(op, ": ", name, " must have shape ", wanted, "] (got ", shape_of(tensor), ")");
  }
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor floats(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  return checked(op, name, tensor, ScalarType::Float, shape);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// What torch.set_num_threads says.
inline int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// The shim has told torch's log why; what a caller can do about it is to ask for less.
[[noreturn]] inline void cannot_allocate(const std::vector<int64_t>& sizes, int32_t type) {
  double bytes = static_cast<double>(aoti_torch_dtype_element_size(type));  // a double: the product may leave int64
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); i++) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
    bytes *= static_cast<double>(sizes[i]);
  }
  char amount[32];
  std::snprintf(amount, sizeof amount, "%.0f", bytes);
  fail("cannot allocate ", text, "], ", amount, " bytes of memory");
}

// A new contiguous tensor [sizes] on the CPU, where `like` is. The C shim is called as it is: stable::new_empty goes
// through the dispatcher, 0.7 us more of the 10 us that a call for one user takes.
inline Tensor empty_like_with(const Tensor& /* like */, const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t strides[8], step = 1;
  FASTDIFF_CHECK(sizes.size() <= 8, "a tensor of ", sizes.size(), " dimensions");
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(1, sizes[i])) strides[i] = step;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, type,
                               aoti_torch_device_type_cpu(), 0, &made) != AOTI_TORCH_SUCCESS)
    cannot_allocate(sizes, type);
  return Tensor(made);
}

}  // namespace fastdiff
