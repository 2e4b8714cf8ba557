// Memory for packed weights and workspaces: aligned, on huge pages where the system gives them (EPYC, 2 cores, AVX2:
// reading 1 GiB goes from 32 to 38 GB/s with them), zeroed by the system, never reallocated while in use.
#pragma once

#include <cstddef>

namespace octomoe::cpu {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(std::size_t bytes);  // zeroed; Error(out_of_memory)
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept { swap(other); }
  HugeBuffer& operator=(HugeBuffer&& other) noexcept {
    HugeBuffer moved(static_cast<HugeBuffer&&>(other));
    swap(moved);
    return *this;
  }

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t size() const { return size_; }

 private:
  void swap(HugeBuffer& other) noexcept {
    void* d = data_;
    const std::size_t s = size_, m = mapped_;
    data_ = other.data_, size_ = other.size_, mapped_ = other.mapped_;
    other.data_ = d, other.size_ = s, other.mapped_ = m;
  }
  void* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t mapped_ = 0;
};

}  // namespace octomoe::cpu
