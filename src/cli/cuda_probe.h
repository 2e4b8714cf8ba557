// Looks for NVIDIA's run-time libraries the way the CUDA engine opens them (cuda/library_search.h), and at the GPUs.
#pragma once

#include <string>
#include <vector>

#include "cuda/library_search.h"

namespace octomoe::cli {

struct Gpu {
  std::string name, arch;  // "NVIDIA H100 80GB HBM3", "sm_90"
  long long memory_bytes = 0;
};

struct CudaProbe {
  std::vector<cuda::LibraryStatus> libraries;  // driver, NVRTC, cuBLAS, NCCL
  std::vector<Gpu> gpus;
  std::vector<std::string> folders;  // that were searched beside the system's own

  static CudaProbe read();
};

// Lets the library search look into the Python that the command uses (find_python).
void search_python_wheels();

}  // namespace octomoe::cli
