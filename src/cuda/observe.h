// Who watches a layer's stages from outside: a profiler's ranges, the events of a stage table, the sizes of a plan.
// Set for one thread, normally nobody: then a call costs one look at a thread's pointer. A call that is watched
// launches its kernels one by one, whatever it would do otherwise.
#pragma once

#include <cstddef>

#include "octomoe/layer.h"

namespace octomoe::cuda {

class StageObserver {
 public:
  virtual ~StageObserver() = default;
  virtual void on_plan(std::size_t workspace_bytes, std::size_t live_bytes) = 0;
  // What is launched on `stream` from now on belongs to this stage; nullptr: to none.
  virtual void on_stage(const char* name, Stream stream) = 0;
};

inline constinit thread_local StageObserver* stage_observer = nullptr;

// Watches the calls of this thread while it lives.
class Observe {
 public:
  explicit Observe(StageObserver& observer) : before_(stage_observer) { stage_observer = &observer; }
  ~Observe() { stage_observer = before_; }
  Observe(const Observe&) = delete;
  Observe& operator=(const Observe&) = delete;

 private:
  StageObserver* before_;
};

}  // namespace octomoe::cuda
