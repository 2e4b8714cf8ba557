// NVIDIA's libraries, opened at run time: nothing is linked, and the same binary serves the CPU on a machine without
// them. One search for the engine and for `octomoe doctor`.
//
// Order: a copy that this process has loaded already (torch's), $CUDA_HOME and $CUDA_PATH, the system's own search
// (ld.so), /usr/local/cuda, then Python wheels (nvidia/*/lib) below the folders given to add_python_paths, below
// $VIRTUAL_ENV, and beside this library. The driver is only ever the system's: it must match the kernel module.
#pragma once

#include <string>
#include <vector>

namespace octomoe::cuda {

enum class Library { driver, nvrtc, cublas, nccl, nvtx };
inline constexpr Library kLibraries[] = {Library::driver, Library::nvrtc, Library::cublas, Library::nccl,
                                         Library::nvtx};

struct LibraryStatus {
  std::string name;     // "CUDA driver"
  std::string purpose;  // what needs it
  std::string fix;      // what to do when it is missing
  bool found = false;   // a file could be opened
  bool usable = false;  // and it answers its version function with a version that we can use
  std::string path = {}, version = {};
  std::string problem = {};             // why a file that is there cannot be used
  std::vector<std::string> tried = {};  // names and files, in order
  void* handle = nullptr;               // from dlopen; never closed: these libraries keep threads and exit handlers

  // "NVRTC: not found (tried libnvrtc.so.13, ...); fix: pip install ..."
  std::string describe() const;
};

// The search of the first call is kept; a library that was not found is searched again after add_python_paths.
const LibraryStatus& find_library(Library library);

// Folders such as Python's sys.path, below which nvidia/*/lib is searched.
void add_python_paths(const std::vector<std::string>& paths);

// The folders that exist and are searched beside the system's own, in order.
std::vector<std::string> library_folders();
// The same for tools (nvdisasm, cuobjdump): $PATH, CUDA's bin folders, wheels (nvidia/*/bin, triton's). "" if there is
// none.
std::string find_tool(const std::string& name);

}  // namespace octomoe::cuda
