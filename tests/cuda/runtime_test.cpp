// Load and launch on real devices: skips where there is none.
#include <gmock/gmock.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "cuda/module.h"
#include "cuda/stream.h"
#include "jit/support.h"
#include "support/errors.h"

namespace octomoe::cuda {
namespace {

namespace jt = jit::testing;
using octomoe::testing::expect_error;

struct Args {
  int* out;
  int n;
};

class Runtime : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!driver_available()) GTEST_SKIP() << "no GPU here: " << find_library(Library::driver).describe();
    if (!jt::have_nvrtc()) GTEST_SKIP() << "no NVRTC here";
    store_ = std::make_unique<jit::KernelStore>(
        jit::KernelStore::Options{.cache_folder = folder_.path(), .sources = &sources_});
    modules_ = std::make_unique<ModuleCache>(*store_);
  }
  jt::TempFolder folder_;
  jit::SourceSet sources_ = jt::small_sources();
  std::unique_ptr<jit::KernelStore> store_;
  std::unique_ptr<ModuleCache> modules_;
};

// n ints on the device, all 10.
class Ints {
 public:
  explicit Ints(int n) : n_(n) {
    OCTOMOE_CUDA(cuMemAlloc, &p_, sizeof(int) * static_cast<std::size_t>(n));
    fill(10);
  }
  ~Ints() { driver().cuMemFree(p_); }
  Ints(const Ints&) = delete;
  Ints& operator=(const Ints&) = delete;
  void fill(int value) {
    const std::vector<int> host(static_cast<std::size_t>(n_), value);
    OCTOMOE_CUDA(cuMemcpyHtoD, p_, host.data(), sizeof(int) * host.size());
  }
  std::vector<int> read() const {
    std::vector<int> host(static_cast<std::size_t>(n_));
    OCTOMOE_CUDA(cuMemcpyDtoH, host.data(), p_, sizeof(int) * host.size());
    return host;
  }
  Args args() const { return {reinterpret_cast<int*>(p_), n_}; }
  unsigned blocks() const { return static_cast<unsigned>((n_ + 127) / 128); }

 private:
  CuDevicePtr p_ = 0;
  int n_;
};

TEST_F(Runtime, RunsAKernelOnEveryDevice) {
  for (int i = 0; i < driver().device_count; ++i) {
    const LoadedKernel& k = modules_->load(jt::small_entry(), i);
    EXPECT_GT(k.registers, 0);
    EXPECT_GT(k.blocks_per_multiprocessor, 0);
    EXPECT_TRUE(k.args_bytes == 0 || k.args_bytes == sizeof(Args));
    const ContextGuard guard(device_info(i));
    Ints x(1000);
    const OwnedStream stream;
    launch(k, {.grid = {x.blocks()}, .stream = stream}, x.args());
    stream.synchronize();
    EXPECT_THAT(x.read(), ::testing::Each(23));
  }
}

TEST_F(Runtime, PtxIsCompiledByTheDriver) {
  const auto image = jit::compile(jt::small_entry(), jit::Target(jit::kPtxArch, true), sources_);
  const ContextGuard guard(device_info(0));
  if (device_info(0).compute_capability < 90) GTEST_SKIP() << "needs SM90";
  CuModule module = nullptr;
  const CuResult rc = driver().cuModuleLoadData(&module, image.image.data());
  if (rc == kCudaUnsupportedPtxVersion) GTEST_SKIP() << "NVRTC is newer than the driver";
  check(rc, "cuModuleLoadData");
  CuFunction f = nullptr;
  OCTOMOE_CUDA(cuModuleGetFunction, &f, module, jit::kKernelName);
  OCTOMOE_CUDA(cuModuleUnload, module);
}

TEST_F(Runtime, GraphsReplayDependentLaunches) {
  const ContextGuard guard(device_info(0));
  const LoadedKernel& k = modules_->load(jt::small_entry(), 0);
  Ints x(4096);
  const OwnedStream stream;
  const Graph graph = Graph::capture(stream, [&] {
    EXPECT_TRUE(is_capturing(stream));
    for (int i = 0; i < 3; ++i) launch(k, {.grid = {x.blocks()}, .stream = stream}, x.args());
    launch(k, {.grid = {0}, .stream = stream}, x.args());  // an empty grid is no node
  });
  EXPECT_EQ(graph.nodes(), 3u);
  EXPECT_FALSE(is_capturing(stream));
  EXPECT_THAT(x.read(), ::testing::Each(10));
  for (int replay = 0; replay < 2; ++replay) {
    x.fill(1);
    graph.launch(stream);
    stream.synchronize();
    EXPECT_THAT(x.read(), ::testing::Each(29));  // 1 -> 5 -> 13 -> 29
  }
  // A capture that failed leaves a stream that works.
  EXPECT_THROW(Graph::capture(stream, [] { throw std::runtime_error("no"); }), std::runtime_error);
  launch(k, {.grid = {x.blocks()}, .stream = stream, .pdl = true}, x.args());
  stream.synchronize();
  EXPECT_THAT(x.read(), ::testing::Each(61));
}

TEST_F(Runtime, Clusters) {
  if (!device_info(0).has_pdl()) GTEST_SKIP() << "needs SM90";
  const ContextGuard guard(device_info(0));
  Ints x(1024);
  launch(modules_->load(jt::small_entry(), 0), {.grid = {8}, .cluster = 2}, x.args());
  EXPECT_THAT(x.read(), ::testing::Each(23));
  expect_error(ErrorCode::cuda, "cluster 3: CUDA_ERROR_",
               [&] { launch(modules_->load(jt::small_entry(), 0), {.grid = {8}, .cluster = 3}, x.args()); });
}

TEST_F(Runtime, ThreadsWithStreamsOfTheirOwn) {
  const int devices = driver().device_count;
  std::atomic<int> good = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      const LoadedKernel& k = modules_->load(jt::small_entry(t % 2 ? "demo::scale<2>" : "demo::scale<3>"), t % devices);
      const ContextGuard guard(device_info(t % devices));
      const OwnedStream stream;
      Ints x(1 << 16);
      launch(k, {.grid = {x.blocks()}, .stream = stream}, x.args());
      stream.synchronize();
      const int want = t % 2 ? 23 : 33;
      const auto got = x.read();
      good += std::all_of(got.begin(), got.end(), [&](int v) { return v == want; });
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(good, 8);
}

TEST_F(Runtime, LaunchErrorsNameTheKernel) {
  const ContextGuard guard(device_info(0));
  const LoadedKernel& k = modules_->load(jt::small_entry(), 0);
  Ints x(16);
  expect_error(ErrorCode::cuda, "kernel demo:scale<2>, grid 1x1x1, 4096 threads",
               [&] { launch(k, {.grid = {1}, .threads = 4096}, x.args()); });
}

// Not a limit that a shared machine could break: printed, and far below a millisecond.
TEST_F(Runtime, HostCostOfALaunch) {
  const ContextGuard guard(device_info(0));
  const LoadedKernel& k = modules_->load(jt::small_entry(), 0);
  Ints x(128);
  const OwnedStream stream;
  const auto run = [&](bool pdl) {
    constexpr int kLaunches = 200;
    stream.synchronize();
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kLaunches; ++i) {
      const ContextGuard inner(device_info(0));
      launch(k, {.grid = {1}, .stream = stream, .pdl = pdl}, x.args());
    }
    const auto end = std::chrono::steady_clock::now();
    stream.synchronize();
    return std::chrono::duration<double, std::micro>(end - begin).count() / kLaunches;
  };
  run(false);
  const double plain = run(false), pdl = run(true);
  std::printf("launch: %.2f us, as a dependent launch: %.2f us\n", plain, pdl);
  EXPECT_LT(plain, 1000);
}

}  // namespace
}  // namespace octomoe::cuda
