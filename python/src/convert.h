// Between tvm-ffi's values and the library's: tensors, options, errors.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <string>

#include "octomoe/octomoe.h"

namespace octomoe::python {

namespace ffi = tvm::ffi;
using OptionalTensor = ffi::Optional<ffi::Tensor>;

// A view of the tensor's memory. Error(unsupported) for a device other than CPU and CUDA, Error(invalid_argument) for a
// dtype or a rank that the library does not have; both name the argument.
TensorView view_of(const ffi::Tensor& tensor, const char* name);
TensorView view_of(const OptionalTensor& tensor, const char* name);  // undefined if absent

// The same memory, kept alive; a contiguous copy if it has strides. Panels (rank 4) with strides stay as they are,
// which the library refuses: a forgotten .contiguous() would else be a copy in runs of 128 bytes, minutes of it on a
// GPU.
Tensor adopt(const ffi::Tensor& tensor, const char* name);
Tensor adopt(const OptionalTensor& tensor, const char* name);
// One-byte values taken as packed int4.
Tensor adopt_int4x2(const ffi::Tensor& tensor, const char* name);

// The same memory, strides and all, or a copy on the CPU of a CUDA tensor: for what the CPU reads (scales, floats to
// quantise).
Tensor on_host(const ffi::Tensor& tensor, const char* name);
Tensor on_host(const OptionalTensor& tensor, const char* name);

// The caller's if given; else the one that tvm-ffi took from the arguments' framework (torch's current stream), or its
// environment's; nullptr on the CPU.
Stream stream_of(const ffi::Optional<std::int64_t>& stream, Device device);

// Shares the memory of a library tensor with the caller; nullopt if undefined. int4x2 becomes uint8.
OptionalTensor to_ffi(const Tensor& tensor);

// The same memory under another dtype of the same size (NumPy has no bfloat16 or E4M3 of its own).
ffi::Tensor reinterpret(const ffi::Tensor& tensor, const ffi::String& dtype);

// Named options as Python passes them; an absent key keeps the default.
class Options {
 public:
  explicit Options(ffi::Map<ffi::String, ffi::Any> map) : map_(std::move(map)) {}
  explicit Options(const ffi::Optional<ffi::Map<ffi::String, ffi::Any>>& map) {
    if (map.has_value()) map_ = map.value();
  }
  template <class T>
  T get(const char* key, T fallback) const {
    auto it = map_.find(ffi::String(key));
    return it == map_.end() ? fallback : (*it).second.template cast<T>();
  }
  std::string text(const char* key, const char* fallback) const { return get<ffi::String>(key, fallback); }
  OptionalTensor tensor(const char* key) const { return get<OptionalTensor>(key, std::nullopt); }
  TensorView view(const char* key) const { return view_of(tensor(key), key); }
  Tensor host(const char* key) const { return on_host(tensor(key), key); }
  bool has(const char* key) const { return map_.count(ffi::String(key)) != 0; }

 private:
  ffi::Map<ffi::String, ffi::Any> map_;
};
using OptionMap = ffi::Map<ffi::String, ffi::Any>;

[[noreturn]] void rethrow_as_ffi(const Error& error);

// Runs f; an octomoe::Error becomes a tvm-ffi error of the kind "octomoe.CODE", which Python maps to its class.
template <class F>
auto guarded(F&& f) {
  try {
    return f();
  } catch (const Error& error) {
    rethrow_as_ffi(error);
  } catch (const std::bad_alloc&) {
    rethrow_as_ffi(Error(ErrorCode::out_of_memory, "out of memory"));
  }
}

}  // namespace octomoe::python
