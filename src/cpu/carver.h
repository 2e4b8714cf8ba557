// Carver: hands out 64-byte aligned parts of one buffer. With a null base it only adds up: one function then gives both
// the size of a workspace and its layout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octomoe::cpu {

inline std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

class Carver {
 public:
  explicit Carver(std::uint8_t* base) : base_(base) {}
  template <class T>
  T* take(std::int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  std::size_t used() const { return used_; }
  void rewind(std::size_t used) { used_ = used; }  // what follows shares memory with what lay behind `used`

 private:
  std::uint8_t* base_;
  std::size_t used_ = 0;
};

}  // namespace octomoe::cpu
