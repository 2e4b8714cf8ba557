// The text of kernels/**, embedded at build time: kernels compile without a file system, and an installed library
// cannot meet another version's headers.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace octomoe::jit {

struct Source {
  std::string_view path;  // below kernels/, as in #include "core/types.h"
  std::string_view text;
};

// Defined in the file that cmake/embed_kernels.cmake writes.
std::span<const Source> embedded_kernels();

// What `text` includes: names, in order of appearance. Comments and string literals do not count, conditions do not
// matter (both branches of an #if count). `line` is 1-based. Error(internal) for computed includes, whose content no
// key could cover.
struct Include {
  std::string name;
  int line = 0;
  bool system = false;  // #include <...>
  bool operator==(const Include&) const = default;
};
std::vector<Include> parse_includes(std::string_view text, std::string_view path);

class SourceSet {
 public:
  SourceSet() = default;
  explicit SourceSet(std::span<const Source> sources);
  static const SourceSet& embedded();

  void set(std::string path, std::string text);
  const std::string* find(const std::string& path) const;
  // `header` and all that it includes, directly or not, sorted by path. Error(internal) naming file and line where a
  // file that is included by "..." is not in the set. One that is included by <...> may be missing: it is in a branch
  // for the host compiler, or NVRTC has it built in (NVRTC is given no include path).
  std::vector<const std::pair<const std::string, std::string>*> closure(const std::string& header) const;

 private:
  std::map<std::string, std::string> files_;
};

}  // namespace octomoe::jit
