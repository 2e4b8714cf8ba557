#include "jit/cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/log.h"
#include "checkpoint/file_io.h"
#include "tensor/check.h"

namespace octomoe::jit {
namespace {

namespace fs = std::filesystem;
using std::chrono::steady_clock;

// File: magic, checksum of the rest, bytes.
constexpr std::array<char, 8> kMagic = {'O', 'C', 'T', 'O', 'K', 'R', 'N', '1'};
constexpr std::size_t kHeaderBytes = kMagic.size() + sizeof(Key::bytes);

// A process that holds a lock compiles for seconds. One that was stopped must not stop everybody else for good.
constexpr std::chrono::seconds kLockPatience{60};
constexpr std::chrono::hours kLeftoverAge{1};

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

struct DiskCache::State {
  std::mutex mutex;
  bool prepared = false, usable = false, warned = false;
};

// An exclusive flock on KEY.lock. The holder removes the file before it lets go, so a waiter that gets the lock checks
// that the name still leads to the file it has locked.
class DiskCache::Lock {
 public:
  Lock(const std::string& path, steady_clock::duration patience) : path_(path) {
    const auto deadline = steady_clock::now() + patience;
    auto pause = std::chrono::milliseconds(1);
    for (;;) {
      fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
      if (fd_ < 0) {
        error_ = errno;
        return;
      }
      while (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK && errno != EINTR) {
          error_ = errno;
          close();
          return;
        }
        if (steady_clock::now() > deadline) {
          error_ = ETIMEDOUT;
          close();
          return;
        }
        std::this_thread::sleep_for(pause);
        pause = std::min(2 * pause, std::chrono::milliseconds(20));
      }
      struct stat locked {
      }, named{};
      if (::fstat(fd_, &locked) == 0 && ::stat(path.c_str(), &named) == 0 && locked.st_ino == named.st_ino &&
          locked.st_dev == named.st_dev) {
        return;
      }
      close();  // somebody finished and removed it between our open and our lock
    }
  }
  ~Lock() {
    if (fd_ < 0) return;
    ::unlink(path_.c_str());
    close();
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
  bool held() const { return fd_ >= 0; }
  int error() const { return error_; }

 private:
  void close() {
    ::close(fd_);
    fd_ = -1;
  }
  std::string path_;
  int fd_ = -1, error_ = 0;
};

DiskCache::DiskCache(std::string folder) : folder_(std::move(folder)), state_(std::make_unique<State>()) {}
DiskCache::~DiskCache() = default;

std::string DiskCache::default_folder() {
  const auto value = [](const char* name) {
    const char* v = std::getenv(name);
    return std::string(v ? v : "");
  };
  if (const std::string own = value("OCTOMOE_CACHE_DIR"); !own.empty()) return own;
  // The XDG rules: a relative path is to be ignored.
  if (const std::string xdg = value("XDG_CACHE_HOME"); xdg.starts_with('/')) return xdg + "/octomoe";
  if (const std::string home = value("HOME"); home.starts_with('/')) return home + "/.cache/octomoe";
  return "";
}

std::string DiskCache::file_of(const Key& key) const { return folder_ + "/" + to_string(key) + ".kernel"; }

void DiskCache::warn_once(const std::string& why) {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->warned) return;
    state_->warned = true;
  }
  log(LogLevel::warning,
      fmt::format("kernel cache {}: {}; kernels are compiled again in each process (OCTOMOE_CACHE_DIR chooses another "
                  "folder)",
                  folder_.empty() ? "(none)" : folder_, why));
}

// True if the folder is there and takes files.
bool DiskCache::prepare() {
  if (folder_.empty()) {
    warn_once("no folder: neither OCTOMOE_CACHE_DIR, XDG_CACHE_HOME nor HOME is set");
    return false;
  }
  std::string problem;
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->prepared) return state_->usable;
    state_->prepared = true;
    std::error_code ec;
    fs::create_directories(folder_, ec);
    if (ec) problem = "cannot be created: " + ec.message();
    if (problem.empty() && ::access(folder_.c_str(), W_OK | X_OK) != 0) problem = "cannot be written: " + reason(errno);
    state_->usable = problem.empty();
  }
  if (!problem.empty()) {
    warn_once(problem);
    return false;
  }
  remove_leftovers();
  return true;
}

// Temporary files of processes that were killed.
void DiskCache::remove_leftovers() {
  std::error_code ec;
  for (fs::directory_iterator it(folder_, ec), end; !ec && it != end; it.increment(ec)) {
    if (it->path().filename().string().find(".kernel.tmp-") == std::string::npos) continue;
    struct stat info {};
    if (::stat(it->path().c_str(), &info) != 0) continue;
    const auto age = std::chrono::system_clock::now() - std::chrono::system_clock::from_time_t(info.st_mtime);
    if (age > kLeftoverAge) ::unlink(it->path().c_str());
  }
}

std::optional<std::vector<std::byte>> DiskCache::load(const Key& key) {
  if (folder_.empty()) return std::nullopt;
  const std::string path = file_of(key);
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return std::nullopt;
  // Read, not mapped: a file that somebody cuts while it is mapped would end the process.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return std::nullopt;
  std::vector<std::byte> file;
  if (::fstat(fd, &info) == 0 && S_ISREG(info.st_mode)) file.resize(static_cast<std::size_t>(info.st_size));
  std::size_t got = 0;
  while (got < file.size()) {
    const ssize_t n = ::read(fd, file.data() + got, file.size() - got);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    got += static_cast<std::size_t>(n);
  }
  ::close(fd);
  file.resize(got);

  if (file.size() >= kHeaderBytes && std::memcmp(file.data(), kMagic.data(), kMagic.size()) == 0) {
    const std::span<const std::byte> body(file.data() + kHeaderBytes, file.size() - kHeaderBytes);
    const Key sum = hash(body);
    if (std::memcmp(file.data() + kMagic.size(), sum.bytes.data(), sum.bytes.size()) == 0) {
      return std::vector<std::byte>(body.begin(), body.end());
    }
  }
  log(LogLevel::info, fmt::format("kernel cache: {} is damaged and is made again", path));
  return std::nullopt;  // left there: another process may have replaced it by now
}

void DiskCache::store(const Key& key, std::span<const std::byte> bytes) {
  const Key sum = hash(bytes);
  try {
    checkpoint::AtomicFile file(file_of(key));
    file.write_at(0, kMagic.data(), kMagic.size());
    file.write_at(kMagic.size(), sum.bytes.data(), sum.bytes.size());
    file.write_at(kHeaderBytes, bytes.data(), bytes.size());
    file.commit();
  } catch (const Error& e) {
    warn_once(e.what());
  }
}

std::vector<std::byte> DiskCache::load_or_make(const Key& key, const std::function<std::vector<std::byte>()>& make,
                                               const std::function<bool(std::span<const std::byte>)>& accept) {
  const auto stored = [&]() -> std::optional<std::vector<std::byte>> {
    auto bytes = load(key);
    if (bytes && accept && !accept(*bytes)) bytes.reset();
    return bytes;
  };
  if (auto bytes = stored()) return std::move(*bytes);
  if (!prepare()) return make();
  const Lock lock(folder_ + "/" + to_string(key) + ".lock", kLockPatience);
  // Without a lock the result is the same, only made more than once.
  if (!lock.held()) warn_once(fmt::format("cannot be locked: {}", reason(lock.error())));
  if (auto bytes = stored()) return std::move(*bytes);  // another process was faster
  std::vector<std::byte> bytes = make();
  store(key, bytes);
  return bytes;
}

}  // namespace octomoe::jit
