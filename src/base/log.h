// How the library's own code reaches the user's log callback (octomoe/log.h).
#pragma once

#include "octomoe/log.h"

namespace octomoe {

void log(LogLevel level, const std::string& message);

}  // namespace octomoe
