// Runs the built command in pipes or in a pseudo-terminal, and keeps temporary folders.
#pragma once

#include <fcntl.h>
#include <pty.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace octomoe::cli::testing {

namespace fs = std::filesystem;

// $OCTOMOE_CLI, or `octomoe` beside this test; "" if neither is there.
inline std::string cli_path() {
  if (const char* given = std::getenv("OCTOMOE_CLI"); given && *given) return given;
  const fs::path beside = fs::read_symlink("/proc/self/exe").parent_path() / "octomoe";
  return fs::exists(beside) ? beside.string() : "";
}

struct Result {
  int code = -1;
  std::string out, err;  // in a terminal: everything is in `out`
};

struct RunOptions {
  std::vector<std::pair<std::string, std::string>> environment = {};  // an empty value unsets
  bool terminal = false;
  std::string out_file = {};  // standard output goes there
  long file_size_limit = 0;   // bytes that the command may write into a file: a full disk
};

namespace detail {

inline std::string drain(int fd) {
  std::string text;
  char chunk[4096];
  for (;;) {
    const ssize_t n = ::read(fd, chunk, sizeof(chunk));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return text;  // a terminal whose other side is gone answers EIO
    text.append(chunk, static_cast<std::size_t>(n));
  }
}

[[noreturn]] inline void exec_child(const std::vector<std::string>& args, const RunOptions& options) {
  ::unsetenv("NO_COLOR");
  ::setenv("TERM", "xterm", 1);
  for (const auto& [name, value] : options.environment) {
    value.empty() ? ::unsetenv(name.c_str()) : ::setenv(name.c_str(), value.c_str(), 1);
  }
  if (options.file_size_limit > 0) {
    ::signal(SIGXFSZ, SIG_IGN);  // stays ignored after exec: writes fail with EFBIG
    const rlimit limit{static_cast<rlim_t>(options.file_size_limit), static_cast<rlim_t>(options.file_size_limit)};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  std::vector<std::string> words = args;
  words.insert(words.begin(), cli_path());
  std::vector<char*> argv;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  ::execv(argv[0], argv.data());
  ::_exit(127);
}

inline int wait_for(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace detail

inline Result run_cli(const std::vector<std::string>& args, const RunOptions& options = {}) {
  Result result;
  if (options.terminal) {
    int fd = -1;
    winsize size{};
    size.ws_row = 50;
    size.ws_col = 160;
    const pid_t pid = ::forkpty(&fd, nullptr, nullptr, &size);
    if (pid == 0) detail::exec_child(args, options);
    result.out = detail::drain(fd);
    result.code = detail::wait_for(pid);
    ::close(fd);
    return result;
  }
  char err_name[] = "/tmp/octomoe-test-XXXXXX";
  const int err = ::mkstemp(err_name);
  ::unlink(err_name);
  int out[2] = {-1, -1};
  if (::pipe(out) != 0) return result;
  const pid_t pid = ::fork();
  if (pid == 0) {
    const int to =
        options.out_file.empty() ? out[1] : ::open(options.out_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    ::dup2(::open("/dev/null", O_RDONLY), 0);
    ::dup2(to, 1);
    ::dup2(err, 2);
    ::close(out[0]);
    ::close(out[1]);
    detail::exec_child(args, options);
  }
  ::close(out[1]);
  result.out = detail::drain(out[0]);
  ::close(out[0]);
  result.code = detail::wait_for(pid);
  ::lseek(err, 0, SEEK_SET);
  result.err = detail::drain(err);
  ::close(err);
  return result;
}

class TempFolder {
 public:
  TempFolder() {
    char name[] = "/tmp/octomoe-test-XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ~TempFolder() {
    std::error_code ec;
    fs::remove_all(path_, ec);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(path_), fs::directory_iterator()));
  }

 private:
  fs::path path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}
inline void write_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

}  // namespace octomoe::cli::testing
