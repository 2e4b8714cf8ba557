#include "cuda/library_search.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <functional>
#include <mutex>

namespace octomoe::cuda {
namespace {

namespace fs = std::filesystem;

constexpr int kOldestNvrtc[] = {12, 4};

struct Wanted {
  const char *name, *purpose, *fix;
  std::vector<std::string> files;  // newest first
  bool system_only;
  // Version text, "" if the library does not answer; `problem` says why it cannot be used.
  std::function<std::string(void* handle, std::string& problem)> version;
};

template <class Fn>
Fn symbol(void* handle, const char* name) {
  return reinterpret_cast<Fn>(dlsym(handle, name));
}

std::string driver_version(void* handle, std::string& problem) {
  const auto init = symbol<int (*)(unsigned)>(handle, "cuInit");
  const auto get = symbol<int (*)(int*)>(handle, "cuDriverGetVersion");
  int v = 0;
  if (!init || !get || get(&v) != 0 || v == 0) return "";
  const int rc = init(0);
  if (rc == 100) problem = "no GPU is visible (CUDA_ERROR_NO_DEVICE); in a container start it with --gpus all";
  if (rc != 0 && rc != 100) {
    problem = fmt::format("cuInit failed with code {}; do the kernel module and libcuda match?", rc);
  }
  return fmt::format("{}.{}", v / 1000, v % 1000 / 10);
}

std::string nvrtc_version(void* handle, std::string& problem) {
  const auto get = symbol<int (*)(int*, int*)>(handle, "nvrtcVersion");
  int major = 0, minor = 0;
  if (!get || get(&major, &minor) != 0) return "";
  if (std::array{major, minor} < std::array{kOldestNvrtc[0], kOldestNvrtc[1]}) {
    problem = fmt::format("version {}.{} is older than {}.{}", major, minor, kOldestNvrtc[0], kOldestNvrtc[1]);
  }
  return fmt::format("{}.{}", major, minor);
}

std::string cublas_version(void* handle, std::string&) {
  const auto get = symbol<int (*)(int, int*)>(handle, "cublasGetProperty");  // MAJOR, MINOR, PATCH; no handle needed
  int v[3] = {0, 0, 0};
  for (int i = 0; i < 3; ++i) {
    if (!get || get(i, &v[i]) != 0) return "";
  }
  return fmt::format("{}.{}.{}", v[0], v[1], v[2]);
}

std::string nccl_version(void* handle, std::string&) {
  const auto get = symbol<int (*)(int*)>(handle, "ncclGetVersion");
  int v = 0;
  if (!get || get(&v) != 0) return "";
  return fmt::format("{}.{}.{}", v / 10000, v % 10000 / 100, v % 100);
}

// The library does not tell its version: what it has says which it is.
std::string nvtx_version(void* handle, std::string&) {
  return dlsym(handle, "nvtxRangePushA") && dlsym(handle, "nvtxRangePop") ? "3" : "";
}

Wanted wanted(Library library) {
  switch (library) {
    case Library::driver:
      return {"CUDA driver",
              "running on a GPU",
              "install NVIDIA's driver; in a container start it with --gpus all",
              {"libcuda.so.1"},
              true,
              driver_version};
    case Library::nvrtc:
      return {"NVRTC",
              "compiling kernels that are in no pack",
              "pip install nvidia-cuda-nvrtc, or set CUDA_HOME",
              {"libnvrtc.so.13", "libnvrtc.so.12"},
              false,
              nvrtc_version};
    case Library::cublas:
      return {"cuBLAS",
              "the peer of octomoe bench --study grouping",
              "pip install nvidia-cublas, or set CUDA_HOME",
              {"libcublas.so.13", "libcublas.so.12"},
              false,
              cublas_version};
    case Library::nvtx:
      return {"NVTX",
              "the named ranges of octomoe bench --profile",
              "pip install nvidia-nvtx, or set CUDA_HOME",
              {"libnvtx3interop.so.1", "libnvToolsExt.so.1"},
              false,
              nvtx_version};
    case Library::nccl:
      break;
  }
  return {"NCCL",
          "tensor and expert parallel layers",
          "pip install nvidia-nccl-cu13 (or -cu12), or apt install libnccl2",
          {"libnccl.so.2"},
          false,
          nccl_version};
}

struct State {
  std::mutex mutex;
  std::vector<std::string> python_paths;
  std::deque<LibraryStatus> all;  // a status that was handed out stays where it is: a later search adds one
  std::array<const LibraryStatus*, std::size(kLibraries)> found{};  // indexed by Library
};
State& state() {
  static State* s = new State;  // never destroyed: kernels may load while static objects die
  return *s;
}

std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&find_library), &info) == 0 || !info.dli_fname) return "";
  std::error_code ec;
  const fs::path path = fs::weakly_canonical(info.dli_fname, ec);
  return ec ? "" : path.parent_path().string();
}

void add_folder(std::vector<std::string>& folders, const fs::path& folder) {
  std::error_code ec;
  if (!fs::is_directory(folder, ec)) return;
  const std::string text = folder.string();
  if (std::find(folders.begin(), folders.end(), text) == folders.end()) folders.push_back(text);
}

std::vector<std::string> subfolders(const fs::path& folder) {
  std::vector<std::string> out;
  std::error_code ec;
  for (fs::directory_iterator it(folder, ec), end; !ec && it != end; it.increment(ec))
    out.push_back(it->path().string());
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<std::string> environment_roots() {
  std::vector<std::string> roots;
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* value = std::getenv(name); value && *value) roots.emplace_back(value);
  }
  return roots;
}

// Folders that may hold `nvidia` (and `triton`): site-packages and the like.
std::vector<std::string> wheel_roots(const std::vector<std::string>& python_paths) {
  std::vector<std::string> roots;
  for (const std::string& path : python_paths) add_folder(roots, path);
  if (const char* venv = std::getenv("VIRTUAL_ENV"); venv && *venv) {
    for (const std::string& lib : subfolders(fs::path(venv) / "lib"))
      add_folder(roots, fs::path(lib) / "site-packages");
  }
  // Installed as a wheel, this library lies in site-packages/octomoe or in a folder below it.
  fs::path here = own_folder();
  for (int i = 0; i < 3 && here.has_relative_path(); ++i) {
    here = here.parent_path();
    std::error_code ec;
    if (fs::is_directory(here / "nvidia", ec)) add_folder(roots, here);
  }
  return roots;
}

void add_cuda_root(std::vector<std::string>& folders, const fs::path& root) {
  for (const char* sub : {"lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"})
    add_folder(folders, root / sub);
}

struct Folders {
  std::vector<std::string> before, after;  // the system's own search
};
Folders search_folders(const std::vector<std::string>& python_paths) {
  Folders f;
  for (const std::string& root : environment_roots()) add_cuda_root(f.before, root);
  add_cuda_root(f.after, "/usr/local/cuda");
  for (const std::string& root : wheel_roots(python_paths)) {
    for (const std::string& wheel : subfolders(fs::path(root) / "nvidia")) add_folder(f.after, fs::path(wheel) / "lib");
  }
  return f;
}

// NVRTC opens its built-in headers' library by soname when it first compiles. Where no RUNPATH leads there, it must
// have been loaded before.
void open_builtins(const std::string& nvrtc_path) {
  for (const std::string& file : subfolders(fs::path(nvrtc_path).parent_path())) {
    const std::string name = fs::path(file).filename().string();
    if (name.starts_with("libnvrtc-builtins.so.")) dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL);
  }
}

class Search {
 public:
  Search(Library library, const Folders& folders) : wanted_(wanted(library)), folders_(folders) {
    status_ = {.name = wanted_.name, .purpose = wanted_.purpose, .fix = wanted_.fix};
  }

  LibraryStatus run() {
    if (any_name(RTLD_NOLOAD, false)) return status_;
    if (!wanted_.system_only && any_file(folders_.before)) return status_;
    if (any_name(0, true)) return status_;
    if (!wanted_.system_only) any_file(folders_.after);
    return status_;
  }

 private:
  bool any_name(int flags, bool record) {
    return std::any_of(wanted_.files.begin(), wanted_.files.end(),
                       [&](const std::string& file) { return open(file, flags, record); });
  }
  bool any_file(const std::vector<std::string>& folders) {
    for (const std::string& folder : folders) {
      for (const std::string& file : wanted_.files) {
        const std::string path = folder + "/" + file;
        std::error_code ec;
        if (!fs::exists(path, ec)) continue;
        if (open(path, 0, true)) return true;
        if (!status_.found) {
          status_.path = path;
          const char* why = dlerror();
          status_.problem = why ? why : "it cannot be opened";
        }
      }
    }
    return false;
  }

  // True: nothing further needs to be tried.
  bool open(const std::string& file, int flags, bool record) {
    if (record) status_.tried.push_back(file);
    void* handle = dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL | flags);
    if (!handle) return false;
    if (!record) status_.tried.push_back(file);
    LibraryStatus next = status_;
    next.found = true;
    next.handle = handle;
    link_map* map = nullptr;
    next.path = dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map ? map->l_name : file;
    next.problem.clear();
    next.version = wanted_.version(handle, next.problem);
    if (next.version.empty()) next.problem = "it does not answer the version call";
    next.usable = next.problem.empty();
    if (next.usable && std::string_view(wanted_.name) == "NVRTC") open_builtins(next.path);
    if (next.usable || !status_.found) {
      status_ = next;
    } else {
      status_.tried = next.tried;
    }
    return next.usable;
  }

  Wanted wanted_;
  const Folders& folders_;
  LibraryStatus status_;
};

}  // namespace

std::string LibraryStatus::describe() const {
  if (usable) return fmt::format("{} {} ({})", name, version, path);
  if (found || !problem.empty()) return fmt::format("{}: {} cannot be used: {}", name, path, problem);
  return fmt::format("{}: not found (tried {}); fix: {}", name, fmt::join(tried, ", "), fix);
}

const LibraryStatus& find_library(Library library) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  const LibraryStatus*& known = s.found[static_cast<std::size_t>(library)];
  if (!known) {
    const Folders folders = search_folders(s.python_paths);
    known = &s.all.emplace_back(Search(library, folders).run());
  }
  return *known;
}

void add_python_paths(const std::vector<std::string>& paths) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  bool changed = false;
  for (const std::string& path : paths) {
    if (path.empty() || std::find(s.python_paths.begin(), s.python_paths.end(), path) != s.python_paths.end()) continue;
    s.python_paths.push_back(path);
    changed = true;
  }
  if (!changed) return;
  for (const LibraryStatus*& known : s.found) {
    if (known && !known->usable) known = nullptr;  // the old one is left to whoever holds it
  }
}

std::vector<std::string> library_folders() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  Folders f = search_folders(s.python_paths);
  for (const std::string& folder : f.after) add_folder(f.before, folder);
  return f.before;
}

std::string find_tool(const std::string& name) {
  std::vector<std::string> folders;
  const char* path = std::getenv("PATH");
  std::string_view rest = path ? path : "";
  while (!rest.empty()) {
    const std::size_t colon = rest.find(':');
    if (colon != 0) add_folder(folders, std::string(rest.substr(0, colon)));
    rest = colon == std::string_view::npos ? "" : rest.substr(colon + 1);
  }
  std::vector<std::string> roots = environment_roots();
  roots.emplace_back("/usr/local/cuda");
  for (const std::string& root : roots) add_folder(folders, fs::path(root) / "bin");
  State& s = state();
  const std::lock_guard lock(s.mutex);
  for (const std::string& root : wheel_roots(s.python_paths)) {
    for (const std::string& wheel : subfolders(fs::path(root) / "nvidia")) add_folder(folders, fs::path(wheel) / "bin");
    add_folder(folders, fs::path(root) / "triton/backends/nvidia/bin");
  }
  for (const std::string& folder : folders) {
    const std::string file = folder + "/" + name;
    std::error_code ec;
    if (fs::is_regular_file(file, ec) && ::access(file.c_str(), X_OK) == 0) return file;
  }
  return "";
}

}  // namespace octomoe::cuda
