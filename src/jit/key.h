// Keys: 128-bit content hashes (XXH128), and the checksum of stored bytes.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "jit/sources.h"
#include "jit/target.h"

namespace octomoe::jit {

struct Key {
  std::array<std::uint8_t, 16> bytes{};
  auto operator<=>(const Key&) const = default;
};
std::string to_string(const Key& key);  // 32 hexadecimal digits
Key hash(std::span<const std::byte> bytes);

// What NVRTC is given for an entry. Nothing in it depends on where the library is installed.
struct Translation {
  std::string source;  // #include of the header and one extern "C" kernel
  std::vector<std::string> options;
  std::vector<const std::pair<const std::string, std::string>*> headers;  // of the SourceSet
};
inline constexpr const char* kKernelName = "octomoe_kernel";
Translation translate(const KernelEntry& entry, Target target, const SourceSet& sources);

// Of everything in the translation. A pack finds its images by it, whichever NVRTC compiled them.
Key source_key(const Translation& translation);
// The same and NVRTC's version: names a file of the disk cache.
Key cache_key(const Key& source, int nvrtc_version);

}  // namespace octomoe::jit
