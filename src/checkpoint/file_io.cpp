#include "checkpoint/file_io.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace {

std::string reason(int error) { return std::generic_category().message(error); }

[[noreturn]] void fail_io(const char* what, const std::string& path, int error) {
  fail(ErrorCode::io, "cannot {} {}: {}", what, path, reason(error));
}

std::string parent_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::string& path) {
  // O_NONBLOCK: opening a pipe or a device must not hang before fstat refuses it.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail_io("open", path, errno);
  struct Close {
    int fd;
    ~Close() { ::close(fd); }
  } close{fd};
  struct stat info {};
  if (::fstat(fd, &info) != 0) fail_io("read", path, errno);
  if (!S_ISREG(info.st_mode)) fail(ErrorCode::io, "cannot read {}: expected a regular file", path);
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->size_ = static_cast<std::size_t>(info.st_size);
  if (file->size_ == 0) return file;
  void* data = ::mmap(nullptr, file->size_, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) fail_io("map", path, errno);
  file->data_ = data;
  return file;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, size_);
}

void release_pages(std::span<const std::byte> mapped) {
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped.data());
  const std::uintptr_t first = begin & ~(page - 1);  // a page shared with a neighbour is read again when needed
  if (!mapped.empty()) ::madvise(reinterpret_cast<void*>(first), begin + mapped.size() - first, MADV_DONTNEED);
}

std::string read_text(const std::string& path, std::size_t max_bytes) {
  const auto file = MappedFile::open(path);
  const auto bytes = file->bytes();
  if (bytes.size() > max_bytes) {
    fail(ErrorCode::format, "{}: expected at most {} bytes, got {}", path, max_bytes, bytes.size());
  }
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

std::string unused_name(const std::string& path) {
  static std::atomic<unsigned> counter{0};
  for (;;) {
    const auto ticks = std::chrono::steady_clock::now().time_since_epoch().count();
    std::string name = fmt::format("{}.tmp-{}-{}-{:x}", path, ::getpid(), counter++, ticks & 0xffffff);
    struct stat info {};
    if (::lstat(name.c_str(), &info) != 0) return name;
  }
}

AtomicFile::AtomicFile(const std::string& path) : path_(path), temporary_(unused_name(path)) {
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) fail_io("create", temporary_, errno);
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write_at(std::uint64_t offset, const void* data, std::size_t bytes) {
  constexpr std::size_t kMost = std::size_t{1} << 30;  // Linux writes at most 2 GiB a call
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd_, p, std::min(bytes, kMost), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_io("write", path_, errno);
    if (n == 0) fail_io("write", path_, ENOSPC);
    p += n;
    offset += static_cast<std::uint64_t>(n);
    bytes -= static_cast<std::size_t>(n);
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail_io("write", path_, errno);
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0) fail_io("write", path_, errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_io("create", path_, errno);
  temporary_.clear();
  sync_folder(parent_of(path_));
}

void write_text(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write_at(0, text.data(), text.size());
  file.commit();
}

void copy_file(const std::string& from, const std::string& to) {
  const auto source = MappedFile::open(from);
  AtomicFile file(to);
  file.write_at(0, source->bytes().data(), source->bytes().size());
  file.commit();
}

void sync_folder(const std::string& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);  // some file systems refuse it; the rename itself is atomic either way
  ::close(fd);
}

bool rename_or_swap(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) == 0) {  // also onto an empty folder
    sync_folder(parent_of(to));
    return false;
  }
  if (errno != ENOTEMPTY && errno != EEXIST) fail_io("create", to, errno);
  if (::syscall(SYS_renameat2, AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) != 0) {
    if (errno != EINVAL && errno != ENOSYS) fail_io("replace", to, errno);
    // This file system cannot swap: two renames, the first undone if the second fails.
    const std::string aside = unused_name(to);
    if (::rename(to.c_str(), aside.c_str()) != 0) fail_io("replace", to, errno);
    if (::rename(from.c_str(), to.c_str()) != 0) {
      const int error = errno;
      ::rename(aside.c_str(), to.c_str());
      fail_io("replace", to, error);
    }
    if (::rename(aside.c_str(), from.c_str()) != 0) fail_io("rename", aside, errno);
  }
  sync_folder(parent_of(to));
  return true;
}

}  // namespace octomoe::checkpoint
