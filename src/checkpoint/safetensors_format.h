// The safetensors file format: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes without
// gaps. https://github.com/huggingface/safetensors
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "octomoe/checkpoint.h"

namespace octomoe::checkpoint {

inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's limit
inline constexpr const char* kMetadataKey = "__metadata__";

struct FileDType {
  const char* name;
  int bits;
  std::optional<DType> dtype;  // unset: a tensor that can be listed and copied, not computed with
};
const FileDType* find_dtype(const std::string& name);  // null if the format has no such type
const char* file_dtype_name(DType dtype);              // int4x2 is stored as "I8"

// Bytes of a tensor; nullopt if a size is negative, the product overflows, or 4- and 6-bit values do not fill bytes.
std::optional<std::uint64_t> tensor_bytes(const FileDType& dtype, const std::vector<std::int64_t>& shape);
std::string shape_text(const std::vector<std::int64_t>& shape);  // "[8, 2048]"

struct ParsedHeader {
  std::vector<SafetensorsFile::Info> tensors;  // in the order of their bytes
  std::map<std::string, std::string> metadata;
};
// Checks everything that the whole file's bytes allow to check. Error(format) names `path`, tensor, expected and got.
ParsedHeader parse_safetensors(std::span<const std::byte> file, const std::string& path);

}  // namespace octomoe::checkpoint
