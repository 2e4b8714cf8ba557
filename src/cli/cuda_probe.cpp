#include "cli/cuda_probe.h"

#include <fmt/format.h>

#include <sstream>

#include "cli/subprocess.h"
#include "cuda/driver.h"

namespace octomoe::cli {
namespace {

// Also of GPUs that are too old for us.
std::vector<Gpu> list_gpus() {
  std::vector<Gpu> gpus;
  if (!cuda::driver_available()) return gpus;
  const cuda::Driver& d = cuda::driver();
  for (int i = 0; i < d.device_count; ++i) {
    cuda::CuDevice device = 0;
    int major = 0, minor = 0;
    char text[256] = "";
    std::size_t bytes = 0;
    if (d.cuDeviceGet(&device, i) != 0) continue;
    d.cuDeviceGetName(text, sizeof(text) - 1, device);
    d.cuDeviceGetAttribute(&major, cuda::kComputeCapabilityMajor, device);
    d.cuDeviceGetAttribute(&minor, cuda::kComputeCapabilityMinor, device);
    d.cuDeviceTotalMem(&bytes, device);
    gpus.push_back({text, fmt::format("sm_{}{}", major, minor), static_cast<long long>(bytes)});
  }
  return gpus;
}

}  // namespace

void search_python_wheels() {
  const std::string python = find_python();
  if (python.empty()) return;
  std::istringstream lines(capture({python, "-c", "import sys; print('\\n'.join(sys.path))"}).value_or(""));
  std::vector<std::string> paths;
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty()) paths.push_back(line);
  }
  cuda::add_python_paths(paths);
}

CudaProbe CudaProbe::read() {
  search_python_wheels();
  CudaProbe p;
  for (const cuda::Library library : cuda::kLibraries) p.libraries.push_back(cuda::find_library(library));
  p.folders = cuda::library_folders();
  p.gpus = list_gpus();
  return p;
}

}  // namespace octomoe::cli
