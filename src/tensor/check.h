// Argument checks with one wording: "ARGUMENT: expected X, got Y".
#pragma once

#include <fmt/format.h>

#include <initializer_list>
#include <string>

#include "octomoe/error.h"
#include "octomoe/tensor.h"

namespace octomoe {

template <class... Args>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
[[noreturn]] void bad_argument(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(ErrorCode::invalid_argument, fmt::format(format, std::forward<Args>(args)...));
}

// -1 in `shape` accepts any size.
void check_defined(const TensorView& t, const char* name);
void check_shape(const TensorView& t, const char* name, std::initializer_list<std::int64_t> shape);
void check_dtype(const TensorView& t, const char* name, std::initializer_list<DType> accepted);
void check_device(const TensorView& t, const char* name, Device device);
void check_contiguous(const TensorView& t, const char* name);
// Last dimension contiguous, others with any stride that is not negative.
void check_rows(const TensorView& t, const char* name);
// The address of each row is a multiple of the element's size.
void check_aligned(const TensorView& t, const char* name);

}  // namespace octomoe
