#include "checkpoint/safetensors_format.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "checkpoint/json_read.h"
#include "tensor/check.h"

static_assert(std::endian::native == std::endian::little, "safetensors files are mapped as they are: little endian");

namespace octomoe::checkpoint {
namespace {

constexpr std::array<FileDType, 20> kDTypes{{
    {"F32", 32, DType::float32},   {"F16", 16, DType::float16},
    {"BF16", 16, DType::bfloat16}, {"F8_E4M3", 8, DType::float8_e4m3},
    {"I8", 8, DType::int8},        {"U8", 8, DType::uint8},
    {"I32", 32, DType::int32},     {"I64", 64, DType::int64},
    {"BOOL", 8, std::nullopt},     {"F4", 4, std::nullopt},
    {"F6_E2M3", 6, std::nullopt},  {"F6_E3M2", 6, std::nullopt},
    {"F8_E5M2", 8, std::nullopt},  {"F8_E8M0", 8, std::nullopt},
    {"I16", 16, std::nullopt},     {"U16", 16, std::nullopt},
    {"U32", 32, std::nullopt},     {"U64", 64, std::nullopt},
    {"F64", 64, std::nullopt},     {"C64", 64, std::nullopt},
}};

SafetensorsFile::Info parse_tensor(const std::string& name, const nlohmann::json& value, const std::string& path,
                                   std::uint64_t data_begin, std::uint64_t data_bytes) {
  const JsonObject entry(value, path + ": tensor " + in_quotes(name));
  SafetensorsFile::Info info;
  info.name = name;

  const std::optional<std::string> dtype_name = entry.string("dtype");
  if (!dtype_name) entry.missing("dtype");
  const FileDType* dtype = find_dtype(*dtype_name);
  if (!dtype) entry.wrong("dtype", "a type of the safetensors format (F32, BF16, I8, ...)");
  info.dtype_name = *dtype_name;
  info.dtype = dtype->dtype;

  const auto shape = entry.integers("shape");
  if (!shape) entry.missing("shape");
  info.shape = *shape;
  const std::optional<std::uint64_t> bytes = tensor_bytes(*dtype, info.shape);
  if (!bytes) entry.wrong("shape", "sizes of at least 0 whose product fits whole bytes and 63 bits");

  const auto offsets = entry.integers("data_offsets");
  if (!offsets) entry.missing("data_offsets");
  if (offsets->size() != 2 || (*offsets)[0] < 0 || (*offsets)[0] > (*offsets)[1]) {
    entry.wrong("data_offsets", "[begin, end] with 0 <= begin <= end");
  }
  const auto begin = static_cast<std::uint64_t>((*offsets)[0]), end = static_cast<std::uint64_t>((*offsets)[1]);
  if (end > data_bytes) {
    entry.wrong("data_offsets", fmt::format("an end within the {} bytes of data that the file has", data_bytes));
  }
  if (end - begin != *bytes) {
    entry.wrong("data_offsets", fmt::format("{} bytes for {} {}", *bytes, info.dtype_name, shape_text(info.shape)));
  }
  info.begin = data_begin + begin;
  info.end = data_begin + end;
  return info;
}

std::map<std::string, std::string> parse_metadata(const nlohmann::json& value, const std::string& path) {
  const JsonObject object(value, path + ": " + kMetadataKey);
  std::map<std::string, std::string> out;
  for (const auto& [key, item] : value.items()) {
    if (!item.is_string()) object.wrong(key, "a string");
    out.emplace(key, item.get<std::string>());
  }
  return out;
}

}  // namespace

const FileDType* find_dtype(const std::string& name) {
  const auto it = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const FileDType& d) { return name == d.name; });
  return it == kDTypes.end() ? nullptr : &*it;
}

const char* file_dtype_name(DType dtype) {
  if (dtype == DType::int4x2) return "I8";
  for (const FileDType& d : kDTypes) {
    if (d.dtype == dtype) return d.name;
  }
  fail(ErrorCode::internal, "no safetensors type for {}", to_string(dtype));
}

std::optional<std::uint64_t> tensor_bytes(const FileDType& dtype, const std::vector<std::int64_t>& shape) {
  std::uint64_t bits = static_cast<std::uint64_t>(dtype.bits);
  bool empty = false;
  for (const std::int64_t n : shape) {
    if (n < 0) return std::nullopt;
    if (n == 0) {
      empty = true;  // the other sizes must still be sound
      continue;
    }
    if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(n), &bits)) return std::nullopt;
  }
  if (empty) return 0;
  if (bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

std::string shape_text(const std::vector<std::int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

ParsedHeader parse_safetensors(std::span<const std::byte> file, const std::string& path) {
  if (file.size() < 8) fail(ErrorCode::format, "{}: expected at least 8 bytes, got {}", path, file.size());
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), 8);
  const std::uint64_t most = std::min<std::uint64_t>(kMaxHeaderBytes, file.size() - 8);
  if (header_bytes < 2 || header_bytes > most) {
    fail(ErrorCode::format, "{}: expected a header length in 2..{}, got {}", path, most, header_bytes);
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, static_cast<std::size_t>(header_bytes));
  if (text.front() != '{')
    fail(ErrorCode::format, "{}: expected a header that starts with '{{', got {}", path, in_quotes(text.substr(0, 8)));
  const nlohmann::json header = parse_json(text, path + ": header");

  ParsedHeader out;
  const std::uint64_t data_begin = 8 + header_bytes, data_bytes = file.size() - data_begin;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadataKey) {
      out.metadata = parse_metadata(value, path);
    } else {
      out.tensors.push_back(parse_tensor(name, value, path, data_begin, data_bytes));
    }
  }
  std::sort(out.tensors.begin(), out.tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::uint64_t at = data_begin;
  for (const auto& t : out.tensors) {
    if (t.begin != at) {
      fail(ErrorCode::format, "{}: tensor {}: expected its data at offset {}, got {} ({})", path, in_quotes(t.name),
           at - data_begin, t.begin - data_begin, t.begin < at ? "overlaps the tensor before it" : "leaves a gap");
    }
    at = t.end;
  }
  if (at != file.size()) {
    fail(ErrorCode::format, "{}: expected {} bytes of data, as the header says, got {}", path, at - data_begin,
         data_bytes);
  }
  return out;
}

}  // namespace octomoe::checkpoint
