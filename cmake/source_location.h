// std::source_location for clang before 16, which lacks the builtin that libstdc++ makes it of. Forced in front of
// every file by CMakeLists.txt (sanitized and fuzzer builds) and scripts/tidy.py; nothing else uses it.
#pragma once

#if defined(__clang__) && __clang_major__ < 16
#include <experimental/source_location>

namespace std {
using experimental::source_location;  // NOLINT(cert-dcl58-cpp)
}
#endif
