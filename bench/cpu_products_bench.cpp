// INT8 products of the CPU engine beside oneDNN's on the same sizes, and a check of whether either is exact.
//
//   cmake -B build -DOCTOMOE_BUILD_BENCH=ON && cmake --build build --target octomoe_bench_cpu_products
//   OMP_NUM_THREADS=2 build/octomoe_bench_cpu_products --benchmark_min_time=0.2
//
// Weights of 48 MB are walked through, so that a call finds its own outside the second-level cache, as in a layer. Ours
// gathers rows, scales and rounds to bf16; oneDNN (weights reordered before, primitive cached) writes int32.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <random>
#include <vector>

#include "base/thread_pool.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "octomoe/weights.h"

#if defined(OCTOMOE_HAVE_DNNL)
#include <dnnl.hpp>
#endif

namespace octomoe {
namespace {

constexpr std::int64_t kWeightBytes = 48 << 20;

// -127..127, eight values a draw.
Tensor random_int8(Shape shape, std::uint32_t seed) {
  Tensor t = Tensor::empty(DType::int8, shape);
  std::mt19937_64 rng(seed);
  std::uint64_t bits = 0;
  for (std::int64_t i = 0; i < t.elems(); ++i, bits >>= 8) {
    if (i % 8 == 0) bits = rng();
    t.as<std::int8_t>()[i] = static_cast<std::int8_t>(std::max(-127, static_cast<int>(bits & 255) - 128));
  }
  return t;
}

struct Size {
  std::int64_t m, n, k;
  std::int64_t experts() const { return std::max<std::int64_t>(1, kWeightBytes / (n * k)); }
};

void report(benchmark::State& state, const Size& s) {
  const double count = static_cast<double>(state.iterations());
  state.counters["GOPS"] =
      benchmark::Counter(2e-9 * static_cast<double>(s.m * s.n * s.k) * count, benchmark::Counter::kIsRate);
  state.counters["GB/s"] =
      benchmark::Counter(1e-9 * static_cast<double>(s.n * s.k) * count, benchmark::Counter::kIsRate);
}

void ours(benchmark::State& state, Scheme scheme, Size s, int threads) {
  ThreadPool pool(threads);
  QuantizedMatrix m;
  m.scheme = scheme;
  m.experts = s.experts();
  m.n = s.n;
  m.k = s.k;
  m.values = random_int8({m.experts, s.n, s.k}, 1);
  const std::int64_t per_expert =
      scheme.kind == SchemeKind::int8_channel ? s.n : m.blocks_n() * std::max(m.blocks_k(), m.super_groups());
  m.scale = Tensor::zeros(DType::float32, {m.experts, per_expert});
  std::fill_n(m.scale.as<float>(), m.scale.elems(), 0.01f);
  if (scheme.kind == SchemeKind::int8_hybrid) {
    m.q = Tensor::zeros(DType::uint8, {m.experts, m.blocks_n(), m.blocks_k()});
    std::fill_n(m.q.as<std::uint8_t>(), m.q.elems(), 3);
  }
  finish_matrix(m, "w");
  cpu::PackOptions options;
  options.isa = cpu::best_isa();
  const cpu::PackedMatrix b = cpu::pack(m, options, pool);

  std::vector<std::uint8_t> rows(cpu::row_set_bytes(b, s.m) + 64), out(static_cast<std::size_t>(s.m * s.n) * 2);
  cpu::Product p;
  p.b = &b;
  p.a = cpu::lay_out_rows(b, s.m, rows.data());
  std::vector<float> x(static_cast<std::size_t>(s.k));
  std::mt19937 rng(2);
  for (std::int64_t r = 0; r < s.m; ++r) {
    for (float& v : x) v = std::normal_distribution<float>()(rng);
    cpu::quantize_row(b, x.data(), 0.0f, p.a, r);
  }
  p.out = out.data();
  p.out_stride_bytes = s.n * 2;
  std::vector<cpu::Task> tasks(cpu::max_tasks(b, s.m, 1, pool.threads()));
  const std::size_t scratch = cpu::scratch_bytes(b, s.m);
  std::vector<std::uint8_t> memory(scratch * static_cast<std::size_t>(pool.threads()));
  std::int32_t expert = 0;
  for (auto _ : state) {
    expert = (expert + 1) % static_cast<std::int32_t>(b.experts);
    const cpu::Group group{0, expert, 0, s.m};
    const std::int64_t count = cpu::make_tasks(&p, &group, 1, pool.threads(), tasks.data());
    pool.parallel_for(count, [&](std::int64_t i, int t) {
      cpu::run_task(p, tasks[static_cast<std::size_t>(i)], memory.data() + scratch * static_cast<std::size_t>(t));
    });
  }
  report(state, s);
}

#if defined(OCTOMOE_HAVE_DNNL)
// s8 or u8 x s8 -> s32 as an inner product, the fastest of its primitives here. Threads: OMP_NUM_THREADS.
class OneDnn {
 public:
  using Type = dnnl::memory::data_type;
  OneDnn(const Size& s, Type a_type) : size_(s), engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    using tag = dnnl::memory::format_tag;
    const dnnl::memory::desc a({s.m, s.k}, a_type, tag::ab), any({s.n, s.k}, Type::s8, tag::any),
        c({s.m, s.n}, Type::s32, tag::ab);
    using Product = dnnl::inner_product_forward;
    const Product::primitive_desc pd(Product::desc(dnnl::prop_kind::forward_inference, a, any, c), engine_);
    product_ = Product(pd);
    a_ = dnnl::memory(a, engine_);
    c_ = dnnl::memory(c, engine_);
    packed_desc_ = pd.weights_desc();
  }
  dnnl::memory pack(std::int8_t* w) {  // [N, K]
    dnnl::memory natural({{size_.n, size_.k}, Type::s8, dnnl::memory::format_tag::ab}, engine_, w);
    dnnl::memory packed(packed_desc_, engine_);
    dnnl::reorder(natural, packed).execute(stream_, natural, packed);
    stream_.wait();
    return packed;
  }
  std::int8_t* a() { return static_cast<std::int8_t*>(a_.get_data_handle()); }
  std::int32_t* c() { return static_cast<std::int32_t*>(c_.get_data_handle()); }
  void run(const dnnl::memory& w) {
    product_.execute(stream_, {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, w}, {DNNL_ARG_DST, c_}});
    stream_.wait();
  }

 private:
  Size size_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  dnnl::memory::desc packed_desc_;
  dnnl::inner_product_forward product_;
  dnnl::memory a_, c_;
};

void onednn(benchmark::State& state, Size s, OneDnn::Type type) {
  OneDnn d(s, type);
  const Tensor a = random_int8({s.m, s.k}, 3);
  std::copy_n(a.as<std::int8_t>(), a.elems(), d.a());
  std::vector<dnnl::memory> w;
  for (std::int64_t e = 0; e < s.experts(); ++e) {
    const Tensor values = random_int8({s.n, s.k}, 4 + static_cast<std::uint32_t>(e));
    w.push_back(d.pack(values.as<std::int8_t>()));
  }
  std::size_t expert = 0;
  for (auto _ : state) {
    expert = (expert + 1) % w.size();
    d.run(w[expert]);
  }
  report(state, s);
}

// What a new row count costs before the first product.
void onednn_setup(benchmark::State& state, Size s) {
  std::int64_t m = s.m;
  for (auto _ : state) {
    OneDnn d({++m, s.n, s.k}, OneDnn::Type::u8);
    benchmark::DoNotOptimize(d.c());
  }
}

// All values 127 or -128: how many sums are wrong.
void onednn_exact(benchmark::State& state, Size s, int a, int w) {
  OneDnn d(s, OneDnn::Type::s8);
  std::fill_n(d.a(), s.m * s.k, static_cast<std::int8_t>(a));
  std::vector<std::int8_t> values(static_cast<std::size_t>(s.n * s.k), static_cast<std::int8_t>(w));
  const dnnl::memory packed = d.pack(values.data());
  for (auto _ : state) d.run(packed);
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < s.m * s.n; ++i) wrong += d.c()[i] != a * w * s.k;
  state.counters["wrong"] = static_cast<double>(wrong);
  state.counters["of"] = static_cast<double>(s.m * s.n);
}
#endif

void register_all() {
  const int threads = default_threads();
  for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{1536, 2048}, {2048, 768}}) {
    for (const std::int64_t m : {1, 8, 16, 64, 128}) {
      const Size s{m, n, k};
      const std::string size = "/N" + std::to_string(n) + "/K" + std::to_string(k) + "/M" + std::to_string(m);
      const auto add = [&](const std::string& name, auto&& fn, auto... args) {
        benchmark::RegisterBenchmark((name + size).c_str(), fn, args...)->UseRealTime()->Unit(benchmark::kMicrosecond);
      };
      add("octomoe_channel", ours, Scheme::int8_channel(), s, threads);
      if (m == 8 || m == 128) {
        add("octomoe_block", ours, Scheme::int8_block(), s, threads);
        add("octomoe_hybrid", ours, Scheme::int8_hybrid(), s, threads);
      }
#if defined(OCTOMOE_HAVE_DNNL)
      add("onednn_u8", onednn, s, OneDnn::Type::u8);
      add("onednn_s8", onednn, s, OneDnn::Type::s8);
#endif
    }
  }
#if defined(OCTOMOE_HAVE_DNNL)
  const Size s{16, 256, 512};
  benchmark::RegisterBenchmark("onednn_setup", onednn_setup, s)->Iterations(50)->Unit(benchmark::kMicrosecond);
  for (const auto& [a, w] : {std::pair<int, int>{127, 127}, {127, -127}, {-128, 127}, {-128, -128}}) {
    benchmark::RegisterBenchmark(("onednn_exact/a" + std::to_string(a) + "/w" + std::to_string(w)).c_str(),
                                 onednn_exact, s, a, w)
        ->Iterations(1);
  }
#endif
}

}  // namespace
}  // namespace octomoe

int main(int argc, char** argv) {
  octomoe::register_all();
  benchmark::AddCustomContext("octomoe_isa", octomoe::cpu::isa_name());
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
