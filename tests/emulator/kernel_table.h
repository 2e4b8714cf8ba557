// The kernels that tests of single ones have instantiated, by their names in the catalogue: compiled once.
#pragma once

#include <map>
#include <string>

namespace octomoe::emulator {

using KernelTable = std::map<std::string, void (*)(const void* args)>;
const KernelTable& sm90_gemms();          // sm90_gemm_test.cpp
const KernelTable& few_tokens_kernels();  // few_tokens_test.cpp
const KernelTable& row_kernels();         // rows_test.cpp

}  // namespace octomoe::emulator
