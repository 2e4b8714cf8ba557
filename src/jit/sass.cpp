#include "jit/sass.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "cuda/library_search.h"
#include "tensor/check.h"

extern char** environ;

namespace octomoe::jit {
namespace {

// A file with a name: the tools seek in their input.
class TemporaryFile {
 public:
  explicit TemporaryFile(std::span<const std::byte> content) {
    path_ = (std::filesystem::temp_directory_path() / "octomoe-XXXXXX").string();
    const int fd = ::mkostemp(path_.data(), O_CLOEXEC);
    if (fd < 0) fail(ErrorCode::io, "cannot create {}", path_);
    std::size_t done = 0;
    while (done < content.size()) {
      const ssize_t n = ::write(fd, content.data() + done, content.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) break;
      done += static_cast<std::size_t>(n);
    }
    ::close(fd);
    if (done < content.size()) {
      ::unlink(path_.c_str());
      fail(ErrorCode::io, "cannot write {}", path_);
    }
  }
  ~TemporaryFile() { ::unlink(path_.c_str()); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string run(const std::vector<std::string>& command) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) fail(ErrorCode::io, "cannot run {}: no pipe", command[0]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 2);
  std::vector<char*> argv;
  for (const std::string& part : command) argv.push_back(const_cast<char*>(part.c_str()));
  argv.push_back(nullptr);
  pid_t pid = -1;
  const int rc = ::posix_spawn(&pid, command[0].c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  std::string text;
  char chunk[65536];
  for (;;) {
    const ssize_t n = rc == 0 ? ::read(ends[0], chunk, sizeof(chunk)) : 0;
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    text.append(chunk, static_cast<std::size_t>(n));
  }
  ::close(ends[0]);
  int status = -1;
  if (rc == 0) {
    while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
  }
  if (rc != 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    const std::string line = text.substr(0, text.find('\n'));
    fail(ErrorCode::io, "{} failed{}{}", command[0], line.empty() ? "" : ": ", line);
  }
  return text;
}

}  // namespace

std::string find_disassembler() {
  for (const char* name : {"nvdisasm", "cuobjdump"}) {
    if (std::string path = cuda::find_tool(name); !path.empty()) return path;
  }
  return "";
}

std::string disassemble(std::span<const std::byte> cubin, const std::string& tool) {
  const TemporaryFile file(cubin);
  const bool cuobjdump = std::filesystem::path(tool).filename() == "cuobjdump";
  if (cuobjdump) return run({tool, "--dump-sass", file.path()});
  // Mnemonics need no data-flow analysis, which takes time.
  return run({tool, "--print-code", "--no-dataflow", file.path()});
}

int count_mnemonic(std::string_view sass, std::string_view mnemonic) {
  const auto word = [](char c) { return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.'; };
  int count = 0;
  for (std::size_t at = sass.find(mnemonic); at != std::string_view::npos; at = sass.find(mnemonic, at + 1)) {
    const std::size_t end = at + mnemonic.size();
    // A mnemonic stands between a blank (behind the address or a predicate) and its modifiers, operands or ";".
    const bool begins = at > 0 && (sass[at - 1] == ' ' || sass[at - 1] == '\t');
    const bool ends = end >= sass.size() || !word(sass[end]) || sass[end] == '.';
    count += begins && ends;
  }
  return count;
}

}  // namespace octomoe::jit
