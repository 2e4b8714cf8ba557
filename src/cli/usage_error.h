#pragma once

#include <stdexcept>

namespace octomoe::cli {

// A bad argument that CLI11 cannot see by itself: exit code 2. Everything else that is thrown: exit code 1.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace octomoe::cli
