// Error: the one exception type of the library.
#pragma once

#include <stdexcept>
#include <string>

#include "octomoe/export.h"

namespace octomoe OCTOMOE_API {

enum class ErrorCode {
  invalid_argument,  // a caller's argument: wrong dtype, shape, stride, device, value
  unsupported,       // a valid request that this build or machine cannot serve
  io,                // a file that cannot be read or written
  format,            // a file whose content is malformed
  out_of_memory,
  cuda,      // a driver, NVRTC or cuBLAS failure
  internal,  // a broken invariant of the library itself
};

const char* to_string(ErrorCode code);

// what() names the argument, what was expected and what came.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace OCTOMOE_API
