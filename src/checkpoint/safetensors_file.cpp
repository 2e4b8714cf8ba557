// SafetensorsFile: a checked header over a read-only map.
#include <cstring>
#include <unordered_map>
#include <utility>

#include "checkpoint/file_io.h"
#include "checkpoint/json_read.h"
#include "checkpoint/safetensors_format.h"
#include "octomoe/checkpoint.h"
#include "tensor/check.h"

namespace octomoe {

using namespace checkpoint;

struct SafetensorsFile::Impl {
  std::string path;
  std::shared_ptr<const MappedFile> map;
  ParsedHeader header;
  std::unordered_map<std::string, std::size_t> by_name;
};

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  auto impl = std::make_shared<Impl>();
  impl->path = path;
  impl->map = MappedFile::open(path);
  impl->header = parse_safetensors(impl->map->bytes(), path);
  for (std::size_t i = 0; i < impl->header.tensors.size(); ++i) impl->by_name.emplace(impl->header.tensors[i].name, i);
  SafetensorsFile file;
  file.impl_ = std::move(impl);
  return file;
}

const std::vector<SafetensorsFile::Info>& SafetensorsFile::tensors() const& { return impl_->header.tensors; }
std::vector<SafetensorsFile::Info> SafetensorsFile::tensors() && { return impl_->header.tensors; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const& { return impl_->header.metadata; }
std::map<std::string, std::string> SafetensorsFile::metadata() && { return impl_->header.metadata; }
const std::string& SafetensorsFile::path() const { return impl_->path; }

const SafetensorsFile::Info* SafetensorsFile::find(const std::string& name) const {
  const auto it = impl_->by_name.find(name);
  return it == impl_->by_name.end() ? nullptr : &impl_->header.tensors[it->second];
}

std::span<const std::byte> SafetensorsFile::bytes(const std::string& name) const {
  const Info* info = find(name);
  if (!info) fail(ErrorCode::format, "{}: expected a tensor {}, got none of that name", path(), in_quotes(name));
  return impl_->map->bytes().subspan(static_cast<std::size_t>(info->begin),
                                     static_cast<std::size_t>(info->end - info->begin));
}

Tensor SafetensorsFile::tensor(const std::string& name) const {
  const std::span<const std::byte> data = bytes(name);
  const Info& info = *find(name);
  if (!info.dtype) {
    fail(ErrorCode::unsupported, "{}: tensor {}: expected a type that this library computes with, got {}", path(),
         in_quotes(name), info.dtype_name);
  }
  if (info.shape.size() > static_cast<std::size_t>(kMaxRank)) {
    fail(ErrorCode::unsupported, "{}: tensor {}: expected at most {} dimensions, got shape {}", path(), in_quotes(name),
         kMaxRank, shape_text(info.shape));
  }
  // The map is read-only: TensorView has no const form, so writing through it faults.
  void* p = const_cast<std::byte*>(data.data());
  const TensorView view(p, *info.dtype, Shape(std::span<const std::int64_t>(info.shape)));
  if (reinterpret_cast<std::uintptr_t>(p) % size_bytes(*info.dtype) == 0) return Tensor::wrap(view, impl_);
  // The format does not promise alignment (the reference writer keeps it). This copy is the only one.
  Tensor copy = Tensor::empty(view.dtype(), view.shape());
  if (!data.empty()) std::memcpy(copy.view().data(), data.data(), data.size());
  return copy;
}

}  // namespace octomoe
