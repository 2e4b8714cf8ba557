// ResourceReport: what ptxas said about a kernel, read from NVRTC's log (--ptxas-options=-v).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace octomoe::jit {

struct ResourceReport {
  int registers = -1;   // -1: not reported (PTX)
  int stack_bytes = 0;  // local memory of a thread
  int spill_store_bytes = 0;
  int spill_load_bytes = 0;
  int static_shared_bytes = 0;
  int tensor_instructions = -1;       // count of the entry's `expect` in the SASS; -1: not counted
  std::vector<std::string> warnings;  // ptxas lines with a code C75xx: serialised wgmma, ignored setmaxnreg

  bool operator==(const ResourceReport&) const = default;
};

ResourceReport parse_report(std::string_view log);

// The first line of a compiler's log that says "error"; else its first line; "" for an empty log.
std::string first_error(std::string_view log);

// Why a pack must not hold this kernel: "spills 16 bytes", "no IMMA in its SASS"; empty if it may.
std::vector<std::string> faults(const ResourceReport& report, const std::string& expect);

}  // namespace octomoe::jit
