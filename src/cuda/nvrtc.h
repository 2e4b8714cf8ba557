// NVRTC, opened at run time: CUDA 12.4 and later. Compiles without a GPU.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace octomoe::cuda {

struct NvrtcProgram {
  std::string source;
  std::string name;                                               // what the log calls it
  std::vector<std::pair<std::string, std::string>> headers = {};  // include name, text: no file is opened
  std::vector<std::string> options = {};
  bool ptx = false;  // else a cubin
};
struct NvrtcResult {
  bool ok = false;
  std::string failure;  // NVRTC's name of what went wrong
  std::string log;
  std::vector<std::byte> image;
};

class Nvrtc {
 public:
  // Error(unsupported) saying what was tried and how to fix it.
  static const Nvrtc& get();
  static const Nvrtc* find(std::string* problem = nullptr);  // null instead of an error

  int version() const { return version_; }                          // 13020 is 13.2
  const std::vector<int>& architectures() const { return archs_; }  // 75, 80, ...
  bool supports(int arch) const;
  const std::string& path() const { return path_; }
  NvrtcResult compile(const NvrtcProgram& program) const;  // thread-safe

 private:
  Nvrtc() = default;
  static bool open(Nvrtc& nvrtc, std::string& problem);
  struct Functions {
    using Program = struct NvrtcProgramOpaque*;
    int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*) = nullptr;
    int (*destroy)(Program*) = nullptr;
    int (*compile)(Program, int, const char* const*) = nullptr;
    int (*cubin_size)(Program, std::size_t*) = nullptr;
    int (*cubin)(Program, char*) = nullptr;
    int (*ptx_size)(Program, std::size_t*) = nullptr;
    int (*ptx)(Program, char*) = nullptr;
    int (*log_size)(Program, std::size_t*) = nullptr;
    int (*log)(Program, char*) = nullptr;
    const char* (*error)(int) = nullptr;
    int (*version)(int*, int*) = nullptr;
    int (*arch_count)(int*) = nullptr;
    int (*archs)(int*) = nullptr;
  };
  Functions call_;
  int version_ = 0;
  std::vector<int> archs_;
  std::string path_;
};

}  // namespace octomoe::cuda
