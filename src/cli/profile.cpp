#include "cli/profile.h"

#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <memory>

#include "cuda/library_search.h"
#include "cuda/observe.h"
#include "cuda/stream.h"
#include "octomoe/error.h"

namespace octomoe::cli {
namespace {

class StageEvents final : public cuda::StageObserver {
 public:
  void on_plan(std::size_t, std::size_t) override {}
  void on_stage(const char* name, Stream stream) override {
    if (used_ == events_.size()) events_.emplace_back();
    events_[used_].record(stream);
    names_.resize(used_);
    names_.emplace_back(name == nullptr ? "" : name);
    ++used_;
  }
  // Of the call since the last time, which must have ended. Stage i lies between events i and i + 1.
  void collect(std::vector<std::string>& order, std::vector<double>& us) {
    for (std::size_t i = 0; i + 1 < used_; ++i) {
      if (names_[i].empty()) continue;
      const auto at = static_cast<std::size_t>(std::find(order.begin(), order.end(), names_[i]) - order.begin());
      if (at == order.size()) order.push_back(names_[i]);
      us.resize(order.size(), 0.0);
      us[at] += cuda::Event::elapsed_us(events_[i], events_[i + 1]);
    }
    used_ = 0;
  }

 private:
  std::deque<cuda::Event> events_;
  std::vector<std::string> names_;
  std::size_t used_ = 0;
};

struct Nvtx {
  int (*push)(const char*) = nullptr;
  int (*pop)() = nullptr;

  static Nvtx open(const cuda::LibraryStatus& library) {
    Nvtx n;
    if (!library.usable) return n;
    n.push = reinterpret_cast<int (*)(const char*)>(dlsym(library.handle, "nvtxRangePushA"));
    n.pop = reinterpret_cast<int (*)()>(dlsym(library.handle, "nvtxRangePop"));
    return n;
  }
};

class StageRanges final : public cuda::StageObserver {
 public:
  explicit StageRanges(const Nvtx& nvtx) : nvtx_(nvtx) {}
  void on_plan(std::size_t, std::size_t) override {}
  void on_stage(const char* name, Stream) override {
    if (open_) nvtx_.pop();
    open_ = name != nullptr;
    if (open_) nvtx_.push(name);
  }

 private:
  const Nvtx& nvtx_;
  bool open_ = false;
};

}  // namespace

GpuCall routed_call(MoeLayer& layer, const Tensor& x, const Tensor& out, const Routes& routes, std::int64_t experts) {
  const std::int64_t tokens = x.dim(0), top_k = routes.ids.dim(1);
  Tensor logits = Tensor::zeros(DType::float32, {tokens, experts});
  for (std::int64_t i = 0; i < tokens * top_k; ++i) {
    const std::int64_t id = routes.ids.as<std::int32_t>()[i];
    if (id >= 0) logits.as<float>()[i / top_k * experts + id] = 20.0f - 0.125f * static_cast<float>(i % top_k);
  }
  const Tensor on_device = Tensor::copy_of(logits, x.device());
  const Tensor ids = Tensor::empty(DType::int32, {tokens, top_k}, x.device());
  const Tensor weights = Tensor::empty(DType::float32, {tokens, top_k}, x.device());
  return [=, &layer](Stream stream) {
    route(on_device, weights, ids, {}, stream);
    layer.forward(x, ids, weights, out, {}, stream);
  };
}

std::vector<StageTime> time_stages(const GpuBench& gpu, const std::vector<GpuCall>& calls,
                                   const HarnessOptions& options) {
  StageEvents events;
  std::vector<std::string> order;
  std::vector<std::vector<double>> samples;  // of each stage
  std::size_t next = 0;
  const auto once = [&] {
    {
      const cuda::Observe observe(events);
      calls[next++ % calls.size()](gpu.stream());
    }
    gpu.synchronize();
    std::vector<double> us(order.size(), 0.0);
    events.collect(order, us);
    samples.resize(order.size());
    double sum = 0;
    for (std::size_t i = 0; i < us.size(); ++i) {
      samples[i].push_back(us[i]);
      sum += us[i];
    }
    return sum;
  };
  interleave({{"stages", once}}, options);
  std::vector<StageTime> stages;
  for (std::size_t i = 0; i < order.size(); ++i) {
    samples[i].erase(samples[i].begin(), samples[i].begin() + options.warmup);
    stages.push_back({order[i], Timing::of(samples[i])});
  }
  return stages;
}

Profiled profile_once(const GpuBench& gpu, const GpuCall& call, const std::string& name) {
  const cuda::Driver& driver = cuda::driver();
  if (driver.cuProfilerStart == nullptr || driver.cuProfilerStop == nullptr) {
    throw Error(ErrorCode::unsupported, "--profile: the CUDA driver has no cuProfilerStart and cuProfilerStop");
  }
  const cuda::LibraryStatus& library = cuda::find_library(cuda::Library::nvtx);
  const Nvtx nvtx = Nvtx::open(library);
  const Profiled result{nvtx.push != nullptr && nvtx.pop != nullptr, library.describe()};
  gpu.synchronize();
  OCTOMOE_CUDA(cuProfilerStart);
  if (result.ranges) {
    StageRanges ranges(nvtx);
    const cuda::Observe observe(ranges);
    nvtx.push(name.c_str());
    call(gpu.stream());
    nvtx.pop();
  } else {
    call(gpu.stream());
  }
  gpu.synchronize();
  OCTOMOE_CUDA(cuProfilerStop);
  return result;
}

}  // namespace octomoe::cli
