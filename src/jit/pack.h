// Pack: a file of compiled kernels for one or more architectures, memory-mapped.
//
//     magic "OCTOPACK"  u32 version  u32 entries  u64 file bytes  u64 index bytes  XXH128 of the header before and the
//     index index: per entry  source key, target, NVRTC version, id, offset, stored bytes, raw bytes, XXH128 of the
//     stored
//                       bytes, resource report
//     images, each compressed with zstd
//
// All integers little-endian. Images are found by source key and target: a pack made from other kernel sources than the
// library's own simply holds nothing for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "jit/compile.h"

namespace octomoe::jit {

inline constexpr std::uint32_t kPackVersion = 1;

struct PackEntry {
  std::string id;
  std::string expect;  // SASS mnemonic counted in report.tensor_instructions
  Target target;
  Key source_key;
  int nvrtc_version = 0;
  int threads = 0, shared_bytes = 0;  // of the launch, for the report
  ResourceReport report;
  std::uint64_t offset = 0, stored_bytes = 0, raw_bytes = 0;
  Key checksum;  // of the stored bytes
};

class Pack {
 public:
  // Header and index are checked here, an image when it is read. Error(io); Error(format) with the reason: not a pack,
  // another version, cut short, damaged.
  static std::shared_ptr<const Pack> open(const std::string& path);
  // The same over bytes that `owner` keeps alive; `name` is for messages.
  static std::shared_ptr<const Pack> parse(std::span<const std::byte> file, std::string name,
                                           std::shared_ptr<const void> owner = {});

  const std::string& name() const { return name_; }
  const std::vector<PackEntry>& entries() const { return entries_; }
  std::uint64_t file_bytes() const { return file_.size(); }
  const PackEntry* find(const Key& source_key, Target target) const;
  std::vector<std::byte> image(const PackEntry& entry) const;  // Error(format) if it is damaged
  CompiledKernel kernel(const PackEntry& entry) const;

 private:
  Pack() = default;
  std::string name_;
  std::span<const std::byte> file_;
  std::shared_ptr<const void> owner_;
  std::vector<PackEntry> entries_;
  std::map<std::pair<Key, Target>, std::size_t> by_key_;
};

struct PackItem {
  CompiledKernel kernel;
  KernelEntry entry;
};
// The file's content; items in any order give the same bytes.
std::vector<std::byte> make_pack(std::span<const PackItem> items);

}  // namespace octomoe::jit
