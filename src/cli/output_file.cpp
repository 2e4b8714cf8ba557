#include "cli/output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "octomoe/error.h"

namespace octomoe::cli {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void cannot_write(const std::string& path, int error) {
  throw Error(ErrorCode::io, fmt::format("{}: cannot write: {}", path, std::strerror(error)));
}

// 0, or the errno of what failed.
int write_all(int fd, const std::string& content) {
  std::size_t done = 0;
  while (done < content.size()) {
    const ssize_t n = ::write(fd, content.data() + done, content.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    done += static_cast<std::size_t>(n);
  }
  return 0;
}

}  // namespace

OutputFile::OutputFile(std::string path, const std::string& suffix) : path_(std::move(path)) {
  if (path_.empty()) throw Error(ErrorCode::io, "output file: the name is empty");
  if (path_ == "-") {
    direct_ = true;
    return;
  }
  std::error_code ec;
  target_ = fs::is_symlink(path_, ec) ? fs::weakly_canonical(path_, ec).string() : path_;
  if (ec || target_.empty()) target_ = path_;
  struct stat info {};
  if (::stat(target_.c_str(), &info) == 0) {
    if (S_ISDIR(info.st_mode)) cannot_write(path_, EISDIR);
    if (::access(target_.c_str(), W_OK) != 0) cannot_write(path_, errno);
    direct_ = !S_ISREG(info.st_mode);
  }
  if (direct_) return;
  temporary_ = fmt::format("{}.tmp.{}{}", target_, ::getpid(), suffix);
  const int fd = ::open(temporary_.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
  if (fd < 0) cannot_write(path_, errno);
  ::close(fd);
  ::unlink(temporary_.c_str());  // it was only a trial: an interrupted run leaves nothing behind
}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void OutputFile::commit(const std::string& content) {
  if (path_ == "-") std::fflush(stdout);  // what was printed before comes first
  const std::string& name = direct_ ? target_ : temporary_;
  const int flags = O_WRONLY | O_TRUNC | O_CLOEXEC | (direct_ ? 0 : O_CREAT);
  const int fd = path_ == "-" ? ::dup(STDOUT_FILENO) : ::open(name.c_str(), flags, 0666);
  if (fd < 0) cannot_write(path_, errno);
  int error = write_all(fd, content);
  if (!error && !direct_ && ::fsync(fd) != 0) error = errno;
  if (::close(fd) != 0 && !error) error = errno;
  if (error) cannot_write(path_, error);
  rename_only();
}

void OutputFile::rename_only() {
  if (direct_) return;
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) cannot_write(path_, errno);
  temporary_.clear();
}

}  // namespace octomoe::cli
