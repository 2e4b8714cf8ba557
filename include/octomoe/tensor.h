// TensorView: dtype, shape, strides and device of memory that somebody else owns.
// Tensor: the same with shared ownership of 64-byte aligned memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

#include "octomoe/error.h"
#include "octomoe/export.h"

namespace octomoe OCTOMOE_API {

enum class DType : std::uint8_t {
  float32,
  float16,
  bfloat16,
  float8_e4m3,
  int8,
  uint8,
  int4x2,  // two signed 4-bit values a byte, the even index in the low half; shapes count bytes
  int32,
  int64,
};

std::size_t size_bytes(DType dtype);  // of one element; int4x2: one byte
const char* to_string(DType dtype);
DType parse_dtype(const std::string& name);  // "bfloat16", "bf16", ...; Error if unknown

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  static Device cpu() { return {}; }
  static Device cuda(int index = 0) { return {DeviceType::cuda, index}; }
  static Device parse(const std::string& name);  // "cpu", "cuda", "cuda:1"
  bool operator==(const Device&) const = default;
};
std::string to_string(Device device);

inline constexpr int kMaxRank = 5;

// Sizes and strides in elements, outermost first. A small value type: pass it by value.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims);
  explicit Shape(std::span<const std::int64_t> dims);

  int rank() const { return rank_; }
  std::int64_t operator[](int i) const { return dims_[static_cast<std::size_t>(i)]; }
  std::int64_t& operator[](int i) { return dims_[static_cast<std::size_t>(i)]; }
  std::int64_t elems() const;  // product; 1 for rank 0
  std::span<const std::int64_t> dims() const { return {dims_.data(), static_cast<std::size_t>(rank_)}; }
  Shape contiguous_strides() const;
  bool operator==(const Shape& other) const;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};
std::string to_string(const Shape& shape);  // "[8, 2048]"

// A view owns nothing. `defined()` is false for a default-constructed view: "not given".
class TensorView {
 public:
  TensorView() = default;
  TensorView(void* data, DType dtype, Shape shape, Device device = {});  // contiguous
  TensorView(void* data, DType dtype, Shape shape, Shape strides, Device device = {});

  bool defined() const { return defined_; }
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  const Shape& strides() const { return strides_; }
  Device device() const { return device_; }
  int rank() const { return shape_.rank(); }
  std::int64_t dim(int i) const { return shape_[i]; }
  std::int64_t elems() const { return shape_.elems(); }
  std::size_t bytes() const;  // of a contiguous tensor of this shape
  bool is_contiguous() const;
  // [begin, begin + count) of the outermost dimension.
  TensorView slice(std::int64_t begin, std::int64_t count) const;
  // The sub-tensor at `index` of the outermost dimension, one rank less.
  TensorView at(std::int64_t index) const;

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::float32;
  Device device_;
  Shape shape_;
  Shape strides_;
  bool defined_ = false;
};

// Contiguous memory (CPU: 64-byte, CUDA: 256-byte aligned) with shared ownership, or memory kept alive by `owner` (a
// file map, a framework's tensor). Copies share the memory.
class Tensor {
 public:
  Tensor() = default;
  static Tensor empty(DType dtype, Shape shape, Device device = {});  // uninitialised; Error(out_of_memory)
  static Tensor zeros(DType dtype, Shape shape, Device device = {});
  static Tensor wrap(TensorView view, std::shared_ptr<const void> owner);
  // Contiguous copy on `device` of a view on any device (from or to CUDA: rows contiguous). Between CPU and CUDA it
  // first waits for all work on the GPU.
  static Tensor copy_of(TensorView view, Device device = {});

  bool defined() const { return view_.defined(); }
  const TensorView& view() const { return view_; }
  operator TensorView() const { return view_; }
  template <class T>
  T* as() const {
    return view_.as<T>();
  }
  DType dtype() const { return view_.dtype(); }
  const Shape& shape() const { return view_.shape(); }
  std::int64_t dim(int i) const { return view_.dim(i); }
  std::int64_t elems() const { return view_.elems(); }
  std::size_t bytes() const { return view_.defined() ? view_.bytes() : 0; }
  Device device() const { return view_.device(); }

 private:
  TensorView view_;
  std::shared_ptr<const void> owner_;
};

}  // namespace OCTOMOE_API
