// Files: read-only maps, and output that appears whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace octomoe::checkpoint {

// A regular file mapped read-only. A file that somebody truncates while it is mapped raises SIGBUS when the lost part
// is read: that is outside what this class can guard against.
class MappedFile {
 public:
  static std::shared_ptr<const MappedFile> open(const std::string& path);  // Error(io) with the path and the reason
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  MappedFile() = default;
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// Tells the kernel that these mapped bytes are not needed soon: a pass over a large file keeps a small resident set.
void release_pages(std::span<const std::byte> mapped);

std::string read_text(const std::string& path, std::size_t max_bytes);  // Error(io); Error(format) if larger

// A new file beside `path` that becomes `path` on commit(), after fsync. Destroyed before that, it vanishes and
// whatever `path` held is untouched. Errors are Error(io) with the path and the reason.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write_at(std::uint64_t offset, const void* data, std::size_t bytes);
  void commit();

 private:
  std::string path_, temporary_;
  int fd_ = -1;
};

void write_text(const std::string& path, const std::string& text);  // by AtomicFile
void copy_file(const std::string& from, const std::string& to);     // by AtomicFile
std::string unused_name(const std::string& path);                   // "PATH.tmp-PID-N", does not exist
void sync_folder(const std::string& folder);                        // best effort
// Renames `from` to `to`; where `to` exists (a folder), swaps the two in one step. True if it swapped.
bool rename_or_swap(const std::string& from, const std::string& to);

}  // namespace octomoe::checkpoint
