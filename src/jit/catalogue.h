// KernelEntry: one line of the catalogue (src/plan/catalogue.cpp). A kernel is a device function template that takes
// one argument struct; what it is specialised by never holds N, K, E, T or the number of multiprocessors.
#pragma once

#include <string>
#include <vector>

namespace octomoe {

struct KernelEntry {
  std::string id;          // "sm80_gemm:int8_channel:swiglu:m128n64k128s4", unique
  std::string header;      // "sm80/grouped_gemm.cuh", below kernels/
  std::string call;        // C++ expression to call: "octomoe::sm80::grouped_gemm<octomoe::GemmConfig{...}>"
  std::string args_type;   // "octomoe::GemmArgs"
  int threads = 0;         // block size
  int min_blocks = 1;      // per multiprocessor: the second argument of __launch_bounds__
  int max_registers = 0;   // of a thread, where neither of the two says it; 0: they do
  int shared_bytes = 0;    // dynamic
  std::vector<int> archs;  // 80, 86, 89: sm_80 ...; 90: sm_90a. What a pack holds of this kernel
  std::string expect;      // SASS mnemonic that must be there ("IMMA"); empty: none
  bool cluster = false;    // launched with a cluster larger than one block
};

const std::vector<KernelEntry>& catalogue();
// nullptr if there is no such id.
const KernelEntry* find_kernel(const std::string& id);

}  // namespace octomoe
