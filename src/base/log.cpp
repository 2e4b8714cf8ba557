#include "base/log.h"

#include <mutex>

namespace octomoe {
namespace {

struct Sink {
  std::mutex mutex;
  LogCallback callback;
};
Sink& sink() {
  static Sink* s = new Sink;  // never destroyed: other static objects may still log
  return *s;
}
thread_local bool inside = false;

}  // namespace

void set_log_callback(LogCallback callback) {
  if (inside) {  // from within a callback, which holds the lock
    sink().callback.swap(callback);
    return;
  }
  const std::lock_guard lock(sink().mutex);
  sink().callback.swap(callback);
}

void log(LogLevel level, const std::string& message) {
  if (inside) return;
  const std::lock_guard lock(sink().mutex);
  const LogCallback callback = sink().callback;
  if (!callback) return;
  inside = true;
  try {
    callback(level, message);
  } catch (...) {  // a logger must not turn a result into a failure
  }
  inside = false;
}

}  // namespace octomoe
