// Kernel packs: precompiled GPU kernels, see docs/packs.md. The pack that is installed with the library is found
// without any of this.
#pragma once

#include <string>
#include <vector>

#include "octomoe/export.h"

namespace octomoe OCTOMOE_API {

// Opens a pack file; its kernels are used before those of other packs. Affects kernels that are loaded later.
// Error(io) if it cannot be read, Error(format) with the reason if it is no pack, of another version, cut or damaged.
void load_kernel_pack(const std::string& path);

// Paths of the packs in use, first searched first. Error(io, format) if OCTOMOE_PACK names a pack that is refused.
std::vector<std::string> kernel_packs();

// Folders such as Python's sys.path, below which nvidia/*/lib may hold CUDA's libraries (NVRTC, cuBLAS, NCCL). The
// Python package calls this; a C++ program needs it only to use libraries out of a Python environment.
void add_cuda_library_paths(const std::vector<std::string>& paths);

}  // namespace OCTOMOE_API
