// What the library has to say beside results and errors: it prints nothing itself.
#pragma once

#include <functional>
#include <string>

#include "octomoe/export.h"

namespace octomoe OCTOMOE_API {

enum class LogLevel {
  info,     // a kernel was compiled, a pack was opened
  warning,  // something works, but worse than it could: a cache folder that cannot be written
};
using LogCallback = std::function<void(LogLevel level, const std::string& message)>;

// Replaces the callback; an empty one drops messages, which is the default. Callable from any thread at any time. The
// callback may run on any thread that calls the library, one message at a time; what it throws is dropped, and what it
// makes the library say meanwhile is dropped too.
void set_log_callback(LogCallback callback);

}  // namespace OCTOMOE_API
