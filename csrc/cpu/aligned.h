// An array of its own, from a 64-byte boundary on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

namespace fastdiff {

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

}  // namespace fastdiff
