#include "cli/gpu.h"

#include <algorithm>
#include <optional>

#include "core/args.h"
#include "cuda/module.h"
#include "cuda/stream.h"
#include "plan/catalogue.h"

namespace octomoe::cli {

struct GpuBench::Impl {
  explicit Impl(Device d)
      : device(d),
        info(cuda::device_info(d.index)),
        context(info),
        sink(Tensor::zeros(DType::int64, {4}, d)),
        read(cuda::load(plan::entry("bench:read"), d.index)),
        multiply(cuda::load(plan::entry("bench:multiply"), d.index)),
        clock(cuda::load(plan::entry("bench:clock"), d.index)) {}

  double launch_us(const cuda::LoadedKernel& kernel, unsigned blocks, const kernels::CeilingArgs& args) {
    cuda::Event begin, end;
    begin.record(stream);
    cuda::launch(kernel, {.grid = {blocks}, .stream = stream}, args);
    end.record(stream);
    end.synchronize();
    return cuda::Event::elapsed_us(begin, end);
  }
  kernels::CeilingArgs args() const {
    return {nullptr, 0, 0, sink.as<std::uint32_t>(), reinterpret_cast<std::uint64_t*>(sink.as<std::int64_t>() + 2)};
  }

  Device device;
  const cuda::DeviceInfo& info;
  cuda::ContextGuard context;
  cuda::OwnedStream stream;
  Tensor sink;
  const cuda::LoadedKernel &read, &multiply, &clock;
};

GpuBench::GpuBench(Device device) : impl_(std::make_unique<Impl>(device)) {}
GpuBench::~GpuBench() = default;

Ceilings GpuBench::ceilings() {
  constexpr std::int64_t kBytes = std::int64_t{1} << 30;
  constexpr int kIterations = 4000, kRounds = 7;
  const Tensor data = Tensor::zeros(DType::uint8, {kBytes}, impl_->device);
  kernels::CeilingArgs args = impl_->args();
  args.data = data.view().data();
  args.bytes = kBytes;
  args.iterations = kIterations;
  const auto sms = static_cast<unsigned>(impl_->info.multiprocessors);
  const unsigned read_blocks = sms * static_cast<unsigned>(impl_->read.blocks_per_multiprocessor);
  std::vector<double> read, multiply;
  for (int i = 0; i < kRounds; ++i) {
    read.push_back(impl_->launch_us(impl_->read, read_blocks, args));
    multiply.push_back(impl_->launch_us(impl_->multiply, sms, args));
  }
  const double warps = impl_->multiply.threads / 32.0;
  const double ops = 2.0 * 16 * 8 * 32 * 16 * kIterations * warps * sms;
  return {1e6 * kBytes / quantile(read, 0.5), 1e6 * ops / quantile(multiply, 0.5)};
}

double GpuBench::clock_mhz() {
  kernels::CeilingArgs args = impl_->args();
  args.iterations = 20000;
  impl_->launch_us(impl_->clock, 1, args);
  const Tensor host = Tensor::copy_of(impl_->sink);
  const auto* v = host.as<std::int64_t>() + 2;
  return v[1] > 0 ? 1e3 * static_cast<double>(v[0]) / static_cast<double>(v[1]) : 0;
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

namespace {

// A call's tensors on the device.
struct Call {
  Tensor ids, weights;
};

void call_all(const GpuBench::Work& w, const std::vector<Call>& calls, Stream stream) {
  for (const Call& c : calls) w.layer->forward(w.x, c.ids, c.weights, w.out, {}, stream);
}

std::vector<Call> upload(const GpuBench::Work& w) {
  std::vector<Call> calls;
  for (const Routes& r : w.routes) {
    calls.push_back({Tensor::copy_of(r.ids, w.x.device()), Tensor::copy_of(r.weights, w.x.device())});
  }
  return calls;
}

}  // namespace

Contender GpuBench::contender(const std::string& name, Work work, bool graph) {
  struct State {
    Work work;
    std::vector<Call> calls;
    cuda::Event begin, end;
    std::optional<cuda::Graph> graph;
  };
  auto s = std::make_shared<State>(State{work, upload(work), cuda::Event(), cuda::Event(), {}});
  const Stream stream = impl_->stream;
  call_all(s->work, s->calls, stream);
  if (graph) s->graph = cuda::Graph::capture(stream, [&] { call_all(s->work, s->calls, stream); });
  return {name, [s, stream] {
            s->begin.record(stream);
            if (s->graph) {
              s->graph->launch(stream);
            } else {
              call_all(s->work, s->calls, stream);
            }
            s->end.record(stream);
            s->end.synchronize();
            return cuda::Event::elapsed_us(s->begin, s->end) / static_cast<double>(s->calls.size());
          }};
}

double GpuBench::host_us(const Work& work) {
  const std::vector<Call> calls = upload(work);
  constexpr int kWarmup = 12, kRounds = 15;  // by then the layer has its graph (LayerOptions::replays)
  std::vector<double> us;
  for (int i = 0; i < kWarmup + kRounds; ++i) {
    const double round = time_us([&] { call_all(work, calls, impl_->stream); });
    impl_->stream.synchronize();
    if (i >= kWarmup) us.push_back(round / static_cast<double>(calls.size()));
  }
  return quantile(us, 0.5);
}

}  // namespace octomoe::cli
