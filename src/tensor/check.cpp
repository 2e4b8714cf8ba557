#include "tensor/check.h"

#include <algorithm>

namespace octomoe {
namespace {

std::string describe(std::initializer_list<std::int64_t> shape) {
  std::string out = "[";
  for (const std::int64_t d : shape) {
    if (out.size() > 1) out += ", ";
    out += d < 0 ? "*" : std::to_string(d);
  }
  return out + "]";
}

}  // namespace

void check_defined(const TensorView& t, const char* name) {
  if (!t.defined()) bad_argument("{}: expected a tensor, got none", name);
  if (t.data() == nullptr && t.elems() > 0) bad_argument("{}: expected data, got a null pointer", name);
}

void check_shape(const TensorView& t, const char* name, std::initializer_list<std::int64_t> shape) {
  bool same = t.rank() == static_cast<int>(shape.size());
  int i = 0;
  for (const std::int64_t want : shape) {
    if (!same) break;
    same = want < 0 || t.dim(i) == want;
    ++i;
  }
  if (!same) bad_argument("{}: expected shape {}, got {}", name, describe(shape), to_string(t.shape()));
}

void check_dtype(const TensorView& t, const char* name, std::initializer_list<DType> accepted) {
  if (std::find(accepted.begin(), accepted.end(), t.dtype()) != accepted.end()) return;
  std::string list;
  for (const DType d : accepted) list += (list.empty() ? "" : " or ") + std::string(to_string(d));
  bad_argument("{}: expected dtype {}, got {}", name, list, to_string(t.dtype()));
}

void check_device(const TensorView& t, const char* name, Device device) {
  if (t.device() != device) {
    bad_argument("{}: expected a tensor on {}, got one on {}", name, to_string(device), to_string(t.device()));
  }
}

void check_contiguous(const TensorView& t, const char* name) {
  if (!t.is_contiguous()) {
    bad_argument("{}: expected a contiguous tensor of shape {}, got strides {}", name, to_string(t.shape()),
                 to_string(t.strides()));
  }
}

void check_rows(const TensorView& t, const char* name) {
  if (t.elems() == 0) return;  // frameworks give empty tensors any strides
  const int last = t.rank() - 1;
  bool good = last < 0 || t.dim(last) <= 1 || t.strides()[last] == 1;
  for (int i = 0; i < last; ++i) good = good && t.strides()[i] >= 0;
  if (!good) {
    bad_argument("{}: expected rows that are contiguous (stride 1 in the last dimension), got strides {}", name,
                 to_string(t.strides()));
  }
}

void check_aligned(const TensorView& t, const char* name) {
  const std::size_t size = size_bytes(t.dtype());
  if (reinterpret_cast<std::uintptr_t>(t.data()) % size != 0) {
    bad_argument("{}: expected data aligned to {} bytes, got address {}", name, size, t.data());
  }
}

}  // namespace octomoe
