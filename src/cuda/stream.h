// Contexts, streams, events and graphs, each as an object. The library runs on the caller's streams; the owning ones
// here are for tests, benchmarks and load-time work.
#pragma once

#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "octomoe/layer.h"

namespace octomoe::cuda {

// Makes a device's primary context current and puts back what was there. Costs one driver call where it is current
// already, which is the usual case.
class ContextGuard {
 public:
  explicit ContextGuard(const DeviceInfo& device) {
    CuContext current = nullptr;
    OCTOMOE_CUDA(cuCtxGetCurrent, &current);
    if (current == device.primary) return;
    OCTOMOE_CUDA(cuCtxPushCurrent, device.primary);
    pushed_ = true;
  }
  ~ContextGuard() {
    CuContext popped = nullptr;
    if (pushed_) driver().cuCtxPopCurrent(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  bool pushed_ = false;
};

inline CuStream cu_stream(Stream stream) { return static_cast<CuStream>(stream); }

namespace detail {

template <class T, CuResult (*Driver::*kDestroy)(T)>
class Handle {
 public:
  Handle() = default;
  ~Handle() { reset(); }
  Handle(Handle&& other) noexcept : value_(std::exchange(other.value_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  T get() const { return value_; }
  T* out() {
    reset();
    return &value_;
  }
  void reset() {
    if (T old = std::exchange(value_, nullptr)) (driver().*kDestroy)(old);
  }

 private:
  T value_ = nullptr;
};

}  // namespace detail

// A stream of the current context that does not synchronise with the default one.
class OwnedStream {
 public:
  OwnedStream() { OCTOMOE_CUDA(cuStreamCreate, handle_.out(), kStreamNonBlocking); }
  CuStream get() const { return handle_.get(); }
  operator Stream() const { return handle_.get(); }
  void synchronize() const { OCTOMOE_CUDA(cuStreamSynchronize, handle_.get()); }

 private:
  detail::Handle<CuStream, &Driver::cuStreamDestroy> handle_;
};

class Event {
 public:
  explicit Event(bool timing = true) {
    OCTOMOE_CUDA(cuEventCreate, handle_.out(), timing ? kEventDefault : kEventNoTiming);
  }
  void record(Stream stream) { OCTOMOE_CUDA(cuEventRecord, handle_.get(), cu_stream(stream)); }
  void synchronize() const { OCTOMOE_CUDA(cuEventSynchronize, handle_.get()); }
  CuEvent get() const { return handle_.get(); }
  static float elapsed_us(const Event& begin, const Event& end) {
    float ms = 0;
    OCTOMOE_CUDA(cuEventElapsedTime, &ms, begin.get(), end.get());
    return 1000.0f * ms;
  }

 private:
  detail::Handle<CuEvent, &Driver::cuEventDestroy> handle_;
};

// While it lives, this thread may allocate and free although a stream of the process is being captured: what it makes
// has nothing to do with that capture, which such a call would invalidate.
class OutsideCaptures {
 public:
  OutsideCaptures() : changed_(driver().cuThreadExchangeStreamCaptureMode(&mode_) == 0) {}
  ~OutsideCaptures() {
    if (changed_) driver().cuThreadExchangeStreamCaptureMode(&mode_);
  }
  OutsideCaptures(const OutsideCaptures&) = delete;
  OutsideCaptures& operator=(const OutsideCaptures&) = delete;

 private:
  int mode_ = kCaptureRelaxed;
  bool changed_;
};

// What `work` launches on `stream`, as a graph that can be replayed. `stream` must not be the default one. Dependent
// launches stay dependent (from CUDA 12.3 on). A graph may be destroyed while it runs: the driver frees it afterwards.
class Graph {
 public:
  Graph() = default;
  ~Graph() {
    if (exec_.get() == nullptr) return;
    const OutsideCaptures outside;
    exec_.reset();
    graph_.reset();
  }
  Graph(Graph&&) noexcept = default;
  Graph& operator=(Graph&&) noexcept = default;
  template <class Work>
  static Graph capture(Stream stream, const Work& work) {
    Graph g;
    OCTOMOE_CUDA(cuStreamBeginCapture, cu_stream(stream), kCaptureThreadLocal);
    try {
      work();
    } catch (...) {
      CuGraph broken = nullptr;  // ends the capture, so that the stream can be used again
      if (driver().cuStreamEndCapture(cu_stream(stream), &broken) == 0 && broken) driver().cuGraphDestroy(broken);
      throw;
    }
    OCTOMOE_CUDA(cuStreamEndCapture, cu_stream(stream), g.graph_.out());
    OCTOMOE_CUDA(cuGraphInstantiate, g.exec_.out(), g.graph_.get(), 0);
    return g;
  }
  void launch(Stream stream) const { OCTOMOE_CUDA(cuGraphLaunch, exec_.get(), cu_stream(stream)); }
  std::size_t nodes() const {
    std::size_t count = 0;
    OCTOMOE_CUDA(cuGraphGetNodes, graph_.get(), nullptr, &count);
    return count;
  }
  std::vector<CuGraphNode> node_list() const {
    std::size_t count = nodes();
    std::vector<CuGraphNode> list(count);
    OCTOMOE_CUDA(cuGraphGetNodes, graph_.get(), list.data(), &count);
    return list;
  }
  CuGraphExec exec() const { return exec_.get(); }
  explicit operator bool() const { return exec_.get() != nullptr; }

 private:
  detail::Handle<CuGraph, &Driver::cuGraphDestroy> graph_;  // names the nodes of exec_
  detail::Handle<CuGraphExec, &Driver::cuGraphExecDestroy> exec_;
};

// Whether work that is launched there now is recorded instead of run: nothing may allocate or synchronise then.
inline bool is_capturing(Stream stream) {
  int status = kCaptureNone;
  OCTOMOE_CUDA(cuStreamIsCapturing, cu_stream(stream), &status);
  return status != kCaptureNone;
}

}  // namespace octomoe::cuda
