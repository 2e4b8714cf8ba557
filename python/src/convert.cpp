#include "convert.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace octomoe::python {
namespace {

struct DTypeRow {
  DLDataType dl;
  DType dtype;
};

constexpr DTypeRow kDTypes[] = {
    {{kDLFloat, 32, 1}, DType::float32},   {{kDLFloat, 16, 1}, DType::float16},
    {{kDLBfloat, 16, 1}, DType::bfloat16}, {{kDLFloat8_e4m3fn, 8, 1}, DType::float8_e4m3},
    {{kDLInt, 8, 1}, DType::int8},         {{kDLUInt, 8, 1}, DType::uint8},
    {{kDLInt, 4, 2}, DType::int4x2},       {{kDLInt, 32, 1}, DType::int32},
    {{kDLInt, 64, 1}, DType::int64},
};

DType dtype_of(DLDataType t, const char* name) {
  for (const DTypeRow& row : kDTypes) {
    if (row.dl.code == t.code && row.dl.bits == t.bits && row.dl.lanes == t.lanes) return row.dtype;
  }
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": dtype " + std::string(ffi::DLDataTypeToString(t)) +
                                               " is not one that OctoMoE has");
}

DLDataType dl_of(DType dtype) {
  if (dtype == DType::int4x2) return {kDLUInt, 8, 1};
  for (const DTypeRow& row : kDTypes) {
    if (row.dtype == dtype) return row.dl;
  }
  throw Error(ErrorCode::internal, "a dtype without a DLPack name");
}

Device device_of(DLDevice device, const char* name) {
  if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost) return Device::cpu();
  if (device.device_type == kDLCUDA) return Device::cuda(device.device_id);
  throw Error(ErrorCode::unsupported, std::string(name) +
                                          ": expected a tensor on cpu or cuda, got DLPack device type " +
                                          std::to_string(device.device_type));
}

// Memory of a library tensor inside a tvm-ffi tensor.
struct SharedMemory {
  Tensor tensor;
  void AllocData(DLTensor* out) { out->data = tensor.view().data(); }
  void FreeData(DLTensor*) { tensor = {}; }
};

// Memory of another tvm-ffi tensor.
struct ForeignMemory {
  ffi::Tensor tensor;
  void AllocData(DLTensor* out) {
    out->data = tensor.data_ptr();
    out->byte_offset = tensor.byte_offset();
  }
  void FreeData(DLTensor*) {}
};

}  // namespace

TensorView view_of(const ffi::Tensor& tensor, const char* name) {
  const Device device = device_of(tensor.device(), name);
  if (tensor.ndim() > kMaxRank) {
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected at most " + std::to_string(kMaxRank) +
                                                 " dimensions, got " + std::to_string(tensor.ndim()));
  }
  const auto rank = static_cast<std::size_t>(tensor.ndim());
  const DLTensor* dl = tensor.GetDLTensorPtr();
  void* data = static_cast<char*>(dl->data) + dl->byte_offset;
  const Shape shape(std::span<const std::int64_t>(dl->shape, rank));
  const DType dtype = dtype_of(dl->dtype, name);
  // An empty tensor has no meaningful strides (NumPy's are 0).
  if (dl->strides == nullptr || shape.elems() == 0) return {data, dtype, shape, device};
  return {data, dtype, shape, Shape(std::span<const std::int64_t>(dl->strides, rank)), device};
}

TensorView view_of(const OptionalTensor& tensor, const char* name) {
  return tensor.has_value() ? view_of(tensor.value(), name) : TensorView();
}

Tensor adopt(const ffi::Tensor& tensor, const char* name) {
  const TensorView view = view_of(tensor, name);
  if (!view.is_contiguous() && view.rank() != 4) return Tensor::copy_of(view, view.device());
  return Tensor::wrap(view, std::make_shared<ffi::Tensor>(tensor));
}

Tensor adopt(const OptionalTensor& tensor, const char* name) {
  return tensor.has_value() ? adopt(tensor.value(), name) : Tensor();
}

Tensor on_host(const ffi::Tensor& tensor, const char* name) {
  const TensorView view = view_of(tensor, name);
  if (view.device().type == DeviceType::cuda) return Tensor::copy_of(view);
  return Tensor::wrap(view, std::make_shared<ffi::Tensor>(tensor));
}

Tensor on_host(const OptionalTensor& tensor, const char* name) {
  return tensor.has_value() ? on_host(tensor.value(), name) : Tensor();
}

Stream stream_of(const ffi::Optional<std::int64_t>& stream, Device device) {
  if (device.type == DeviceType::cpu) return nullptr;
  if (stream.has_value()) return reinterpret_cast<Stream>(static_cast<std::uintptr_t>(stream.value()));
  return TVMFFIEnvGetStream(kDLCUDA, device.index);
}

Tensor adopt_int4x2(const ffi::Tensor& tensor, const char* name) {
  Tensor bytes = adopt(tensor, name);
  if (bytes.dtype() == DType::int4x2) return bytes;
  if (size_bytes(bytes.dtype()) != 1) {
    throw Error(
        ErrorCode::invalid_argument,
        std::string(name) + ": expected two INT4 values in each int8 or uint8, got dtype " + to_string(bytes.dtype()));
  }
  const TensorView view(bytes.view().data(), DType::int4x2, bytes.shape(), bytes.device());
  return Tensor::wrap(view, std::make_shared<Tensor>(std::move(bytes)));
}

OptionalTensor to_ffi(const Tensor& tensor) {
  if (!tensor.defined()) return std::nullopt;
  const auto dims = tensor.shape().dims();
  const Device d = tensor.device();
  const DLDevice device = d.type == DeviceType::cuda ? DLDevice{kDLCUDA, d.index} : DLDevice{kDLCPU, 0};
  return ffi::Tensor::FromNDAlloc(SharedMemory{tensor}, ffi::ShapeView(dims.data(), dims.size()), dl_of(tensor.dtype()),
                                  device);
}

ffi::Tensor reinterpret(const ffi::Tensor& tensor, const ffi::String& dtype) {
  const DLDataType from = tensor.dtype(), to = ffi::StringToDLDataType(dtype);
  if (from.bits * from.lanes != to.bits * to.lanes) {
    throw Error(ErrorCode::invalid_argument, "dtype: " + std::string(dtype) + " has another size than " +
                                                 std::string(ffi::DLDataTypeToString(from)));
  }
  return ffi::Tensor::FromNDAllocStrided(ForeignMemory{tensor}, tensor.shape(), tensor.strides(), to, tensor.device());
}

void rethrow_as_ffi(const Error& error) {
  throw ffi::Error(std::string("octomoe.") + to_string(error.code()), error.what(), "");
}

}  // namespace octomoe::python

TVM_FFI_DLL_EXPORT_TYPED_FUNC(reinterpret, [](const tvm::ffi::Tensor& tensor, const tvm::ffi::String& dtype) {
  return octomoe::python::guarded([&] { return octomoe::python::reinterpret(tensor, dtype); });
})
