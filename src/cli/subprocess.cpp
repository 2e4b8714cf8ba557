#include "cli/subprocess.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <thread>

#include "cli/machine.h"
#include "octomoe/error.h"

extern char** environ;

namespace octomoe::cli {
namespace {

using Clock = std::chrono::steady_clock;

// posix_spawnp with the three standard descriptors replaced. -1: /dev/null. Returns the pid, or -1 with errno set.
pid_t spawn(const std::vector<std::string>& command, const std::vector<std::string>& variables, int in, int out,
            int err) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  const int wanted[3] = {in, out, err};
  for (int fd = 0; fd < 3; ++fd) {
    if (wanted[fd] < 0) {
      posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", fd == 0 ? O_RDONLY : O_WRONLY, 0);
    } else {
      posix_spawn_file_actions_adddup2(&actions, wanted[fd], fd);
    }
  }
  std::vector<std::string> words = command, environment;
  for (char** e = environ; *e; ++e) {
    const std::string entry = *e;
    bool replaced = false;
    for (const std::string& v : variables) replaced |= entry.starts_with(v.substr(0, v.find('=') + 1));
    if (!replaced) environment.push_back(entry);
  }
  environment.insert(environment.end(), variables.begin(), variables.end());
  const auto pointers = [](std::vector<std::string>& strings) {
    std::vector<char*> p;
    for (std::string& s : strings) p.push_back(s.data());
    p.push_back(nullptr);
    return p;
  };
  pid_t pid = -1;
  const int rc =
      posix_spawnp(&pid, words[0].c_str(), &actions, nullptr, pointers(words).data(), pointers(environment).data());
  posix_spawn_file_actions_destroy(&actions);
  errno = rc;
  return rc == 0 ? pid : -1;
}

int decode(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

void close_fd(int& fd) {
  if (fd >= 0) ::close(fd);
  fd = -1;
}

}  // namespace

std::optional<std::string> capture(const std::vector<std::string>& command) {
  int pipe_out[2];
  if (::pipe2(pipe_out, O_CLOEXEC) != 0) return std::nullopt;
  const pid_t pid = spawn(command, {}, -1, pipe_out[1], -1);
  ::close(pipe_out[1]);
  std::string text;
  char chunk[4096];
  for (ssize_t n; pid > 0 && ((n = ::read(pipe_out[0], chunk, sizeof(chunk))) > 0 || (n < 0 && errno == EINTR));) {
    if (n > 0) text.append(chunk, static_cast<std::size_t>(n));
  }
  ::close(pipe_out[0]);
  if (pid < 0) return std::nullopt;
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return decode(status) == 0 ? std::optional(text) : std::nullopt;
}

Child::Child(const std::vector<std::string>& command, const std::vector<std::string>& variables) {
  ::signal(SIGPIPE, SIG_IGN);  // a child that dies is an error return of write, not the end of this process
  int to[2] = {-1, -1}, from[2] = {-1, -1};
  char name[] = "/tmp/octomoe-XXXXXX";
  err_ = ::mkostemp(name, O_CLOEXEC);
  if (err_ >= 0) ::unlink(name);
  if (::pipe2(to, O_CLOEXEC) == 0 && ::pipe2(from, O_CLOEXEC) == 0) {
    pid_ = spawn(command, variables, to[0], from[1], err_);
  }
  const int error = errno;
  close_fd(to[0]);
  close_fd(from[1]);
  in_ = to[1];
  out_ = from[0];
  if (pid_ < 0) {
    close_fd(in_);
    close_fd(out_);
    close_fd(err_);
    throw Error(ErrorCode::unsupported, fmt::format("cannot start {}: {}", command[0], std::strerror(error)));
  }
}

Child::~Child() {
  close_fd(in_);
  close_fd(out_);
  for (int i = 0; i < 200 && !waited_; ++i) {
    int status = 0;
    if (::waitpid(pid_, &status, WNOHANG) == pid_) waited_ = true;
    if (!waited_) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  if (!waited_) ::kill(pid_, SIGKILL);
  if (!waited_) ::waitpid(pid_, nullptr, 0);
  close_fd(err_);
}

bool Child::write_line(const std::string& line) {
  const std::string text = line + "\n";
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::write(in_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    done += static_cast<std::size_t>(n);
  }
  return true;
}

std::optional<std::string> Child::read_line(double timeout_s) {
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
  for (;;) {
    const std::size_t newline = buffer_.find('\n');
    if (newline != std::string::npos) {
      std::string line = buffer_.substr(0, newline);
      buffer_.erase(0, newline + 1);
      return line;
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    pollfd p{out_, POLLIN, 0};
    const int ready = ::poll(&p, 1, static_cast<int>(std::max<std::int64_t>(0, left)));
    if (ready < 0 && errno == EINTR) continue;
    timed_out_ = ready == 0;
    if (ready <= 0) return std::nullopt;
    char chunk[4096];
    const ssize_t n = ::read(out_, chunk, sizeof(chunk));
    if (n <= 0) return std::nullopt;
    buffer_.append(chunk, static_cast<std::size_t>(n));
  }
}

std::string Child::error_text() const {
  if (err_ < 0) return "";
  char tail[4096];
  const off_t size = ::lseek(err_, 0, SEEK_END);
  const off_t begin = std::max<off_t>(0, size - static_cast<off_t>(sizeof(tail)));
  const ssize_t n = ::pread(err_, tail, sizeof(tail), begin);
  std::istringstream lines(std::string(tail, static_cast<std::size_t>(std::max<ssize_t>(0, n))));
  std::string last;
  for (std::string line; std::getline(lines, line);) {
    if (line.find_first_not_of(" \t\r") != std::string::npos) last = line;
  }
  return last;
}

int Child::wait() {
  if (waited_) return code_;
  close_fd(in_);
  int status = 0;
  while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
  waited_ = true;
  return code_ = decode(status);
}

std::string find_python() {
  const auto runs = [](const std::string& path) { return ::access(path.c_str(), X_OK) == 0; };
  if (const char* given = std::getenv("OCTOMOE_PYTHON"); given && *given) return given;
  if (const char* env = std::getenv("VIRTUAL_ENV"); env && *env && runs(std::string(env) + "/bin/python")) {
    return std::string(env) + "/bin/python";
  }
  if (runs(".venv/bin/python")) return ".venv/bin/python";
  const std::string root = source_root();
  if (!root.empty() && runs(root + "/.venv/bin/python")) return root + "/.venv/bin/python";
  return capture({"python3", "-c", ""}) ? "python3" : "";
}

std::vector<std::string> python_environment() {
  const std::string root = source_root();
  if (root.empty()) return {};
  const char* old = std::getenv("PYTHONPATH");
  return {fmt::format("PYTHONPATH={}/python{}{}", root, old && *old ? ":" : "", old ? old : "")};
}

}  // namespace octomoe::cli
