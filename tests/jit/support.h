// Small kernels of the tests' own, and temporary folders.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/library_search.h"
#include "cuda/nvrtc.h"
#include "jit/compile.h"
#include "octomoe/log.h"

namespace octomoe::jit::testing {

// Folder of a Python environment in the source tree, where a developer's NVRTC may be.
inline void search_source_tree() {
  std::vector<std::string> paths;
  std::error_code ec;
  const std::filesystem::path lib = std::filesystem::path(OCTOMOE_SOURCE_DIR) / ".venv/lib";
  for (std::filesystem::directory_iterator it(lib, ec), end; !ec && it != end; it.increment(ec)) {
    paths.push_back((it->path() / "site-packages").string());
  }
  cuda::add_python_paths(paths);
}

inline bool have_nvrtc() {
  search_source_tree();
  return cuda::Nvrtc::find() != nullptr;
}

#define OCTOMOE_NEED_NVRTC() \
  if (!::octomoe::jit::testing::have_nvrtc()) GTEST_SKIP() << "no NVRTC here"

inline SourceSet small_sources() {
  SourceSet s;
  s.set("core/base.h",
        "#pragma once\nnamespace demo {\nusing u32 = unsigned int;\ninline constexpr int kAdd = 3;\n}\n");
  s.set("core/unused.h", "#pragma once\n");
  s.set("demo.cuh", R"(#pragma once
#include "core/base.h"
#if !defined(__CUDACC_RTC__)
#include <cstdint>
#endif
namespace demo {
struct Args { int* out; int n; };
template <int kScale>
__device__ void scale(const Args& args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) args.out[i] = args.out[i] * kScale + kAdd;
}
// One int8 tensor-core instruction.
template <int kTimes>
__device__ void tensor(const Args& args) {
  int d[4] = {};
  const u32 a[4] = {1, 2, 3, threadIdx.x}, b[2] = {4, 5};
  for (int i = 0; i < kTimes; ++i) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  args.out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
// Indexed at run time: must live in local memory.
template <int kSize>
__device__ void local(const Args& args) {
  int a[kSize];
  for (int i = 0; i < kSize; ++i) a[i] = args.out[i];
  a[args.n & (kSize - 1)] += 1;
  for (int i = 0; i < kSize; ++i) args.out[i] = a[args.out[i] & (kSize - 1)];
}
template <int kSize>
__device__ void shared(const Args& args) {
  __shared__ int s[kSize];
  s[threadIdx.x] = args.out[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = s[args.n];
}
}  // namespace demo
)");
  return s;
}

inline KernelEntry small_entry(const std::string& call = "demo::scale<2>") {
  KernelEntry e;
  e.id = "demo:" + call.substr(6);
  e.header = "demo.cuh";
  e.call = call;
  e.args_type = "demo::Args";
  e.threads = 128;
  e.archs = {80, 86, 89, 90};
  if (call.starts_with("demo::tensor")) e.expect = "IMMA";
  return e;
}

// A kernel that no compiler has seen.
inline CompiledKernel made_up_kernel(const std::string& id, Target target, std::size_t bytes) {
  CompiledKernel k;
  k.id = id;
  k.target = target;
  k.source_key = hash(std::as_bytes(std::span(id)));
  k.nvrtc_version = 13000;
  k.report.registers = 40;
  k.report.warnings = {"ptxas warning (C7510): \xC3\xA4"};
  for (std::size_t i = 0; i < bytes; ++i) k.image.push_back(static_cast<std::byte>((i * i / 7 + id.size()) & 0xff));
  return k;
}

class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "octomoe-test-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~TempFolder() {
    std::error_code ec;
    std::filesystem::permissions(path_, std::filesystem::perms::owner_all, ec);
    std::filesystem::remove_all(path_, ec);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string path(const std::string& name = "") const { return name.empty() ? path_ : path_ + "/" + name; }
  std::vector<std::string> files() const {
    std::vector<std::string> out;
    for (const auto& e : std::filesystem::directory_iterator(path_)) out.push_back(e.path().filename().string());
    return out;
  }

 private:
  std::string path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
inline void write_file(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

// Collects what the library logs while it lives.
class LogCatcher {
 public:
  LogCatcher() {
    set_log_callback([this](LogLevel level, const std::string& message) {
      const std::lock_guard lock(mutex_);
      (level == LogLevel::warning ? warnings_ : infos_).push_back(message);
    });
  }
  ~LogCatcher() { set_log_callback({}); }
  LogCatcher(const LogCatcher&) = delete;
  LogCatcher& operator=(const LogCatcher&) = delete;
  std::vector<std::string> warnings() const {
    const std::lock_guard lock(mutex_);
    return warnings_;
  }
  std::vector<std::string> infos() const {
    const std::lock_guard lock(mutex_);
    return infos_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> warnings_, infos_;
};

}  // namespace octomoe::jit::testing
