// The instruction sets that the CPU kernels exist for, and the float environment that they need.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "octomoe/error.h"

namespace octomoe::cpu {

// Ordered: a later one is preferred.
enum class Isa : std::uint8_t {
  portable,  // plain loops, any machine
  avx2,      // AVX2 + FMA + F16C
  vnni,      // AVX-512 F/BW/DQ/VL + VNNI
  amx,       // the same + AMX INT8 and BF16
};
const char* to_string(Isa isa);
Isa parse_isa(const std::string& name);  // Error(invalid_argument) if unknown

// Those this machine and its operating system can run, portable first. The first forward asks too (ops.cpp): by
// reference, as it must not allocate.
const std::vector<Isa>& available_isas();
// OCTOMOE_CPU_ISA if set (Error(unsupported) if this machine lacks it), else the last of available_isas(). Engines ask
// once, when they are made.
Isa best_isa();
// The name of best_isa(), for `octomoe doctor` and reports.
const char* isa_name();

// Round to nearest, subnormals kept, exceptions masked while alive: a caller's flush-to-zero mode must not change bits.
class FloatEnv {
 public:
  FloatEnv();
  ~FloatEnv();
  FloatEnv(const FloatEnv&) = delete;
  FloatEnv& operator=(const FloatEnv&) = delete;

 private:
  std::uint64_t saved_;
};

}  // namespace octomoe::cpu
