// Which instructions a cubin holds, by NVIDIA's disassembler. For `octomoe pack` and tests; nothing at run time needs
// it.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace octomoe::jit {

// Path of nvdisasm, else of cuobjdump; "" if neither is in $PATH, CUDA_HOME or a Python wheel (cuda/library_search.h).
std::string find_disassembler();

// SASS of a cubin. Error(io) if the tool cannot be run or fails.
std::string disassemble(std::span<const std::byte> cubin, const std::string& tool);

// Instructions of that mnemonic in SASS: "IMMA" counts IMMA and IMMA.16832.S8.S8, not IGMMA.
int count_mnemonic(std::string_view sass, std::string_view mnemonic);

}  // namespace octomoe::jit
