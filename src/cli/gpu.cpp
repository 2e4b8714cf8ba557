#include "cli/gpu.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "core/args.h"
#include "cuda/module.h"
#include "cuda/observe.h"
#include "cuda/stream.h"
#include "plan/catalogue.h"
#include "quant/matrix.h"

namespace octomoe::cli {
namespace {
constexpr std::int64_t kPoolBytes = std::int64_t{1} << 30;
}

struct GpuBench::Impl {
  explicit Impl(Device d)
      : device(d),
        info(cuda::device_info(d.index)),
        context(info),
        sink(Tensor::zeros(DType::int64, {4}, d)),
        read(cuda::load(plan::entry("bench:read"), d.index)),
        multiply(cuda::load(plan::entry("bench:multiply"), d.index)),
        clock(cuda::load(plan::entry("bench:clock"), d.index)) {}

  template <class Work>
  double time_us(const Work& work) {
    cuda::Event begin, end;
    begin.record(stream);
    work();
    end.record(stream);
    end.synchronize();
    return cuda::Event::elapsed_us(begin, end);
  }
  // Cycles and nanoseconds of a loop that runs behind what is on the stream now: the load's clock, not that of a GPU
  // which has waited for the host.
  void launch_clock(int iterations) const {
    kernels::CeilingArgs a = args();
    a.iterations = iterations;
    cuda::launch(clock, {.grid = {1}, .stream = stream}, a);
  }
  double read_clock_mhz() const {
    const Tensor host = Tensor::copy_of(sink);
    const auto* v = host.as<std::int64_t>() + 2;
    return v[1] > 0 ? 1e3 * static_cast<double>(v[0]) / static_cast<double>(v[1]) : 0;
  }
  // Memory that is there to be read. What was captured before it grew must not run again.
  void grow_pool(std::int64_t bytes) {
    if (static_cast<std::int64_t>(pool.bytes()) >= bytes) return;
    pool = {};
    pool = Tensor::zeros(DType::uint8, {bytes}, device);
  }
  void launch_read(std::int64_t begin, std::int64_t bytes) const {
    constexpr std::int64_t kPerThread = 8 * 16;  // read_ceiling's loads in flight
    kernels::CeilingArgs a = args();
    a.data = pool.as<std::uint8_t>() + begin;
    a.bytes = bytes;
    const std::int64_t wanted = ceil_div(bytes, kPerThread * read.threads);
    const std::int64_t resident = std::int64_t{info.multiprocessors} * read.blocks_per_multiprocessor;
    cuda::launch(read, {.grid = {static_cast<unsigned>(std::min(wanted, resident))}, .stream = stream}, a);
  }
  kernels::CeilingArgs args() const {
    return {nullptr, 0, 0, sink.as<std::uint32_t>(), reinterpret_cast<std::uint64_t*>(sink.as<std::int64_t>() + 2)};
  }

  Device device;
  const cuda::DeviceInfo& info;
  cuda::ContextGuard context;
  cuda::OwnedStream stream;
  Tensor sink, pool;
  const cuda::LoadedKernel &read, &multiply, &clock;
};

GpuBench::GpuBench(Device device) : impl_(std::make_unique<Impl>(device)) {}
GpuBench::~GpuBench() = default;

Ceilings GpuBench::ceilings() {
  constexpr int kIterations = 4000, kRounds = 7;
  impl_->grow_pool(kPoolBytes);
  const auto sms = static_cast<unsigned>(impl_->info.multiprocessors);
  kernels::CeilingArgs args = impl_->args();
  args.iterations = kIterations;
  std::vector<double> read, multiply;
  for (int i = 0; i < kRounds; ++i) {
    read.push_back(impl_->time_us([&] { impl_->launch_read(0, kPoolBytes); }));
    multiply.push_back(
        impl_->time_us([&] { cuda::launch(impl_->multiply, {.grid = {sms}, .stream = impl_->stream}, args); }));
  }
  const double warps = impl_->multiply.threads / 32.0;
  const double ops = 2.0 * 16 * 8 * 32 * 16 * kIterations * warps * sms;
  return {1e6 * kPoolBytes / quantile(read, 0.5), 1e6 * ops / quantile(multiply, 0.5)};
}

nlohmann::ordered_json GpuBench::describe() const {
  const int driver = cuda::driver().version;
  return {{"name", impl_->info.name},
          {"compute_capability", impl_->info.compute_capability},
          {"multiprocessors", impl_->info.multiprocessors},
          {"memory_bytes", impl_->info.memory_bytes},
          {"l2_bytes", impl_->info.l2_bytes},
          {"driver_cuda", std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10)}};
}

Device GpuBench::device() const { return impl_->device; }
const cuda::DeviceInfo& GpuBench::info() const { return impl_->info; }
Stream GpuBench::stream() const { return impl_->stream; }
void GpuBench::synchronize() const { impl_->stream.synchronize(); }

int GpuBench::copies(double bytes) const {
  const double wanted = std::ceil(4.0 * impl_->info.l2_bytes / std::max(bytes, 1.0));
  return static_cast<int>(std::clamp(wanted, 1.0, static_cast<double>(kGpuCalls)));
}

Contender GpuBench::contender(const std::string& name, std::vector<GpuCall> calls, bool graph,
                              const Clocks& clocks) const {
  const int count = static_cast<int>(calls.size());
  struct State {
    std::vector<GpuCall> calls;
    cuda::Event begin, end;
    std::optional<cuda::Graph> graph;
    void make(Stream stream) const {
      for (const GpuCall& call : calls) call(stream);
    }
  };
  auto s = std::make_shared<State>(State{std::move(calls), cuda::Event(), cuda::Event(), {}});
  const Stream stream = impl_->stream;
  s->make(stream);
  if (graph) s->graph = cuda::Graph::capture(stream, [&] { s->make(stream); });
  return {name,
          [s, stream, clocks, impl = impl_.get()] {
            s->begin.record(stream);
            if (s->graph) {
              s->graph->launch(stream);
            } else {
              s->make(stream);
            }
            s->end.record(stream);
            if (clocks) {
              impl->launch_clock(20000);
              clocks->push_back(impl->read_clock_mhz());
            }
            s->end.synchronize();
            return cuda::Event::elapsed_us(s->begin, s->end) / static_cast<double>(s->calls.size());
          },
          count};
}

Contender GpuBench::cold_contender(const std::string& name, GpuCall call) {
  struct State {
    GpuCall call;
    cuda::Event begin, end;
  };
  auto s = std::make_shared<State>(State{std::move(call), cuda::Event(), cuda::Event()});
  const std::int64_t bytes = std::int64_t{4} * impl_->info.l2_bytes;
  impl_->grow_pool(bytes);
  return {name, [s, bytes, impl = impl_.get()] {
            impl->launch_read(0, bytes);
            s->begin.record(impl->stream);
            s->call(impl->stream);
            s->end.record(impl->stream);
            s->end.synchronize();
            return cuda::Event::elapsed_us(s->begin, s->end);
          }};
}

Contender GpuBench::read_contender(double bytes, bool graph) {
  const std::int64_t each = std::max<std::int64_t>(std::llround(bytes) / 16 * 16, 16);
  impl_->grow_pool(std::max(each, kPoolBytes));
  const std::int64_t free = (static_cast<std::int64_t>(impl_->pool.bytes()) - each) / 16 * 16;
  std::vector<GpuCall> calls;
  for (std::int64_t i = 0; i < kGpuCalls; ++i) {
    calls.emplace_back([impl = impl_.get(), begin = free == 0 ? 0 : i * each % free, each](Stream) {
      impl->launch_read(begin, each);
    });
  }
  return contender("read", std::move(calls), graph);
}

GpuCall GpuBench::empty_call() const {
  return [impl = impl_.get()](Stream) { impl->launch_clock(0); };
}

double GpuBench::host_us(const std::vector<GpuCall>& calls) const {
  constexpr int kWarmup = 12, kRounds = 15;  // by then the layer has its graph (LayerOptions::replays)
  std::vector<double> us;
  for (int i = 0; i < kWarmup + kRounds; ++i) {
    const double round = time_us([&] {
      for (const GpuCall& call : calls) call(impl_->stream);
    });
    impl_->stream.synchronize();
    if (i >= kWarmup) us.push_back(round / static_cast<double>(calls.size()));
  }
  return quantile(us, 0.5);
}

GpuBench::WorkspaceUse GpuBench::workspace(const GpuCall& layer_call) const {
  struct Sizes final : cuda::StageObserver {
    WorkspaceUse use;
    void on_plan(std::size_t bytes, std::size_t live) override {
      use = {static_cast<double>(bytes), static_cast<double>(live)};
    }
    void on_stage(const char*, Stream) override {}
  } sizes;
  const cuda::Observe observe(sizes);
  layer_call(impl_->stream);
  synchronize();
  return sizes.use;
}

}  // namespace octomoe::cli
