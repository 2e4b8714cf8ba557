#include "octomoe/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/memory.h"
#include "tensor/check.h"

namespace octomoe {

const char* to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "invalid_argument";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::io:
      return "io";
    case ErrorCode::format:
      return "format";
    case ErrorCode::out_of_memory:
      return "out_of_memory";
    case ErrorCode::cuda:
      return "cuda";
    case ErrorCode::internal:
      return "internal";
  }
  return "?";
}

namespace {

struct DTypeInfo {
  DType dtype;
  std::size_t bytes;
  const char* name;
  const char* alias;
};
constexpr DTypeInfo kDTypes[] = {
    {DType::float32, 4, "float32", "f32"},    {DType::float16, 2, "float16", "fp16"},
    {DType::bfloat16, 2, "bfloat16", "bf16"}, {DType::float8_e4m3, 1, "float8_e4m3", "float8_e4m3fn"},
    {DType::int8, 1, "int8", "i8"},           {DType::uint8, 1, "uint8", "u8"},
    {DType::int4x2, 1, "int4x2", "int4"},     {DType::int32, 4, "int32", "i32"},
    {DType::int64, 8, "int64", "i64"},
};

const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)]; }

}  // namespace

std::size_t size_bytes(DType dtype) { return info(dtype).bytes; }
const char* to_string(DType dtype) { return info(dtype).name; }

DType parse_dtype(const std::string& name) {
  for (const DTypeInfo& d : kDTypes) {
    if (name == d.name || name == d.alias) return d.dtype;
  }
  bad_argument(
      "dtype: expected one of float32, float16, bfloat16, float8_e4m3, int8, uint8, int4x2, int32, int64, got \"{}\"",
      name);
}

Device Device::parse(const std::string& name) {
  if (name == "cpu") return Device::cpu();
  if (name == "cuda") return Device::cuda(0);
  if (name.starts_with("cuda:") && name.size() > 5 && name.size() < 10 &&
      std::all_of(name.begin() + 5, name.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    return Device::cuda(std::atoi(name.c_str() + 5));
  }
  bad_argument("device: expected \"cpu\", \"cuda\" or \"cuda:N\", got \"{}\"", name);
}

std::string to_string(Device device) {
  return device.type == DeviceType::cpu ? std::string("cpu") : fmt::format("cuda:{}", device.index);
}

Shape::Shape(std::initializer_list<std::int64_t> dims)
    : Shape(std::span<const std::int64_t>(dims.begin(), dims.size())) {}

Shape::Shape(std::span<const std::int64_t> dims) : rank_(static_cast<int>(dims.size())) {
  if (dims.size() > kMaxRank) bad_argument("shape: expected at most {} dimensions, got {}", kMaxRank, dims.size());
  for (std::size_t i = 0; i < dims.size(); ++i) dims_[i] = dims[i];
}

std::int64_t Shape::elems() const {
  std::int64_t n = 1;
  for (const std::int64_t d : dims()) n *= d;
  return n;
}

Shape Shape::contiguous_strides() const {
  Shape s = *this;
  std::int64_t step = 1;
  for (int i = rank_ - 1; i >= 0; --i) {
    s[i] = step;
    step *= (*this)[i];
  }
  return s;
}

bool Shape::operator==(const Shape& other) const { return std::ranges::equal(dims(), other.dims()); }

std::string to_string(const Shape& shape) {
  std::string out = "[";
  for (int i = 0; i < shape.rank(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

TensorView::TensorView(void* data, DType dtype, Shape shape, Device device)
    : TensorView(data, dtype, shape, shape.contiguous_strides(), device) {}

TensorView::TensorView(void* data, DType dtype, Shape shape, Shape strides, Device device)
    : data_(data), dtype_(dtype), device_(device), shape_(shape), strides_(strides), defined_(true) {
  if (shape.rank() != strides.rank()) {
    bad_argument("strides: expected {} of them, got {}", shape.rank(), strides.rank());
  }
  for (const std::int64_t d : shape.dims()) {
    if (d < 0) bad_argument("shape: expected sizes of at least 0, got {}", to_string(shape));
  }
}

std::size_t TensorView::bytes() const { return static_cast<std::size_t>(elems()) * size_bytes(dtype_); }

bool TensorView::is_contiguous() const {
  std::int64_t step = 1;
  if (elems() == 0) return true;
  for (int i = rank() - 1; i >= 0; --i) {
    if (dim(i) != 1 && strides_[i] != step) return false;
    step *= dim(i);
  }
  return true;
}

TensorView TensorView::slice(std::int64_t begin, std::int64_t count) const {
  if (rank() == 0 || begin < 0 || count < 0 || begin > dim(0) - count) {
    bad_argument("slice: expected a range inside {}, got [{}, {})", to_string(shape_), begin, begin + count);
  }
  TensorView v = *this;
  v.shape_[0] = count;
  v.data_ = static_cast<char*>(data_) + begin * strides_[0] * static_cast<std::int64_t>(size_bytes(dtype_));
  return v;
}

TensorView TensorView::at(std::int64_t index) const {
  const TensorView row = slice(index, 1);
  return TensorView(row.data_, dtype_, Shape(shape_.dims().subspan(1)), Shape(strides_.dims().subspan(1)), device_);
}

Tensor Tensor::empty(DType dtype, Shape shape, Device device) {
  constexpr std::size_t kAlignment = 64;
  constexpr std::size_t kMaxBytes = std::size_t{1} << 40;  // a size beyond it is a mistake, not a wish
  std::size_t elems = 1;
  for (const std::int64_t d : shape.dims()) {
    if (d < 0) bad_argument("shape: expected sizes of at least 0, got {}", to_string(shape));
    if (__builtin_mul_overflow(elems, static_cast<std::size_t>(d), &elems)) elems = kMaxBytes + 1;
  }
  std::size_t bytes = 0;
  const bool sensible = !__builtin_mul_overflow(elems, size_bytes(dtype), &bytes) && bytes <= kMaxBytes;
  Tensor t;
  if (sensible && device.type == DeviceType::cuda) {
    t.owner_ = cuda::allocate(device.index, bytes);
  } else if (sensible) {
    // Padded so that vector loads of a last partial vector stay inside.
    void* data = std::aligned_alloc(kAlignment, (bytes + 2 * kAlignment - 1) / kAlignment * kAlignment);
    if (data) t.owner_ = std::shared_ptr<const void>(data, [](const void* p) { std::free(const_cast<void*>(p)); });
  }
  if (!t.owner_) {
    fail(ErrorCode::out_of_memory, "cannot allocate {} of shape {} on {}", to_string(dtype), to_string(shape),
         to_string(device));
  }
  t.view_ = TensorView(const_cast<void*>(t.owner_.get()), dtype, shape, device);
  return t;
}

Tensor Tensor::zeros(DType dtype, Shape shape, Device device) {
  Tensor t = empty(dtype, shape, device);
  if (device.type == DeviceType::cuda) {
    cuda::fill_zero(t.view_.data(), t.bytes(), device.index);
  } else {
    std::memset(t.view_.data(), 0, t.bytes());
  }
  return t;
}

Tensor Tensor::wrap(TensorView view, std::shared_ptr<const void> owner) {
  Tensor t;
  t.view_ = view;
  t.owner_ = std::move(owner);
  return t;
}

Tensor Tensor::copy_of(TensorView view, Device device) {
  check_defined(view, "copy_of");
  if (view.device().type == DeviceType::cuda || device.type == DeviceType::cuda) {
    Tensor t = empty(view.dtype(), view.shape(), device);
    cuda::copy(view, t.view());
    return t;
  }
  Tensor t = empty(view.dtype(), view.shape());
  if (view.elems() == 0) return t;
  if (view.is_contiguous()) {
    std::memcpy(t.view_.data(), view.data(), view.bytes());
    return t;
  }
  const std::size_t size = size_bytes(view.dtype());
  const int rank = view.rank();
  std::array<std::int64_t, kMaxRank> index{};
  auto* dst = t.as<char>();
  for (std::int64_t i = 0; i < view.elems(); ++i, dst += size) {
    std::int64_t offset = 0;
    for (int d = 0; d < rank; ++d) offset += index[static_cast<std::size_t>(d)] * view.strides()[d];
    std::memcpy(dst, view.as<char>() + offset * static_cast<std::int64_t>(size), size);
    for (int d = rank - 1; d >= 0 && ++index[static_cast<std::size_t>(d)] == view.dim(d); --d) {
      index[static_cast<std::size_t>(d)] = 0;
    }
  }
  return t;
}

}  // namespace octomoe
