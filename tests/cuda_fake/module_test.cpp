// src/cuda/module over a driver that only writes down what it is asked (fake_driver.cpp): runs without a GPU.
#include "cuda/module.h"

#include <dlfcn.h>
#include <gmock/gmock.h>

#include <cstring>
#include <thread>

#include "cuda/launch_list.h"
#include "cuda/stream.h"
#include "cuda/tensor_map.h"
#include "cuda_fake/fake_driver.h"
#include "jit/support.h"
#include "support/errors.h"

namespace octomoe::cuda {
namespace {

using octomoe::testing::expect_error;
using ::testing::HasSubstr;
namespace jt = jit::testing;

struct Args {
  int value = 0;
  int rest[3] = {};
};

class Module : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    // Loaded under its soname first, it is what the search finds.
    const std::filesystem::path here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    void* fake = dlopen((here / "fake_cuda/libcuda.so.1").c_str(), RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(fake, nullptr) << dlerror();
    get_state = reinterpret_cast<FakeCudaState* (*)()>(dlsym(fake, "fake_cuda_state"));
    primary = reinterpret_cast<void* (*)(int)>(dlsym(fake, "fake_cuda_primary"));
  }
  void SetUp() override {
    *get_state() = {};
    entry_ = jt::small_entry();
    entry_.shared_bytes = 100'000;
    for (const int arch : {80, 90}) add(arch);
    add(jit::Target(90, true));
    store_ = std::make_unique<jit::KernelStore>(jit::KernelStore::Options{.sources = &sources_, .packs = packs_});
    modules_ = std::make_unique<ModuleCache>(*store_);
  }
  void add(jit::Target target) {
    jit::CompiledKernel k = jt::made_up_kernel(entry_.id, target, 64);
    k.source_key = jit::source_key(jit::translate(entry_, target, sources_));
    const jit::PackItem items[] = {{k, entry_}};
    const auto bytes = std::make_shared<std::vector<std::byte>>(jit::make_pack(items));
    packs_.push_back(jit::Pack::parse(*bytes, "fake.pack", bytes));
  }
  static FakeCudaState& state() { return *get_state(); }

  static FakeCudaState* (*get_state)();
  static void* (*primary)(int);
  KernelEntry entry_;
  jit::SourceSet sources_ = jt::small_sources();
  std::vector<std::shared_ptr<const jit::Pack>> packs_;
  std::unique_ptr<jit::KernelStore> store_;
  std::unique_ptr<ModuleCache> modules_;
};
FakeCudaState* (*Module::get_state)() = nullptr;
void* (*Module::primary)(int) = nullptr;

CuContext current() {
  CuContext c = nullptr;
  OCTOMOE_CUDA(cuCtxGetCurrent, &c);
  return c;
}

TEST_F(Module, LoadsOncePerDevice) {
  const LoadedKernel& a = modules_->load(entry_, 0);
  EXPECT_EQ(&modules_->load(entry_, 0), &a);
  EXPECT_EQ(state().loads, 1);
  EXPECT_EQ(state().set_shared, 100'000);
  EXPECT_EQ(a.blocks_per_multiprocessor, 2);
  EXPECT_EQ(a.device->compute_capability, 90);
  EXPECT_NE(&modules_->load(entry_, 1), &a);
  EXPECT_EQ(state().loads, 2);
  EXPECT_EQ(store_->counts().from_pack, 1);  // the image is shared
}

TEST_F(Module, ManyThreadsLoadOnce) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 12; ++i) threads.emplace_back([&, i] { modules_->load(entry_, i % 2); });
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(state().loads, 2);
  EXPECT_EQ(state().pushes, state().pops);
}

TEST_F(Module, LeavesTheCurrentContextAlone) {
  EXPECT_EQ(current(), nullptr);
  modules_->load(entry_, 0);
  EXPECT_EQ(current(), nullptr);
  const auto other = static_cast<CuContext>(primary(1));
  OCTOMOE_CUDA(cuCtxPushCurrent, other);
  modules_->load(entry_, 2);
  EXPECT_EQ(current(), other);
  const int pushes = state().pushes;
  modules_->load(jt::small_entry(), 1);  // current already: nothing to push
  { const ContextGuard guard(device_info(1)); }
  EXPECT_EQ(state().pushes, pushes);
  CuContext popped = nullptr;
  OCTOMOE_CUDA(cuCtxPopCurrent, &popped);
}

TEST_F(Module, LaunchPassesEverything) {
  const LoadedKernel& k = modules_->load(entry_, 0);
  launch(k, {.grid = {5, 6, 7}, .stream = &state(), .pdl = true, .cluster = 2}, Args{42});
  EXPECT_THAT(state().grid, ::testing::ElementsAre(5, 6, 7));
  EXPECT_THAT(state().block, ::testing::ElementsAre(128, 1, 1));
  EXPECT_EQ(state().shared_bytes, 100'000u);
  EXPECT_EQ(state().stream, &state());
  EXPECT_EQ(state().cluster, 2u);
  EXPECT_TRUE(state().pdl);
  EXPECT_EQ(state().first_argument, 42);
  launch(k, {.grid = {1}, .threads = 64, .shared_bytes = 0}, Args{});
  EXPECT_EQ(state().block[0], 64u);
  EXPECT_EQ(state().shared_bytes, 0u);
  EXPECT_EQ(state().cluster, 0u);
  EXPECT_FALSE(state().pdl);
}

TEST_F(Module, EmptyGridsStartNothing) {
  launch(modules_->load(entry_, 0), {.grid = {0}}, Args{});
  EXPECT_EQ(state().launches, 0);
}

TEST_F(Module, DependentLaunchOnlyWhereTheArchitectureHasIt) {
  launch(modules_->load(entry_, 2), {.grid = {1}, .pdl = true}, Args{});
  EXPECT_EQ(state().launches, 1);
  EXPECT_FALSE(state().pdl);
}

TEST_F(Module, WrongArgumentStructIsCaught) {
  state().args_bytes = 24;
  const LoadedKernel& k = modules_->load(entry_, 0);
  expect_error(ErrorCode::internal, "demo:scale<2>: expected arguments of 24 bytes, got 16",
               [&] { launch(k, {.grid = {1}}, Args{}); });
}

TEST_F(Module, ErrorsSayWhatFailed) {
  const LoadedKernel& k = modules_->load(entry_, 0);
  state().fail_next_launch = 1;
  expect_error(
      ErrorCode::cuda,
      "cuLaunchKernelEx: kernel demo:scale<2>, grid 3x1x1, 128 threads, 100000 bytes of shared memory, cluster 1: "
      "CUDA_ERROR_OTHER (1): made up",
      [&] { launch(k, {.grid = {3}}, Args{}); });
  state().fail_next_launch = 2;
  expect_error(ErrorCode::out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY", [&] { launch(k, {.grid = {3}}, Args{}); });
  state().fail_next_load = 999;
  expect_error(ErrorCode::cuda, "src/cuda/module.cpp:", [&] { modules_->load(entry_, 1); });
  EXPECT_NO_THROW(modules_->load(entry_, 1));  // tried again
}

// A pack from a newer CUDA than the driver: the kernel is compiled here.
TEST_F(Module, RefusedImagesAreCompiled) {
  OCTOMOE_NEED_NVRTC();
  jt::LogCatcher log;
  state().fail_next_load = kCudaInvalidImage;
  modules_->load(entry_, 0);
  EXPECT_EQ(state().loads, 2);
  EXPECT_EQ(store_->counts().compiled, 1);
  ASSERT_FALSE(log.warnings().empty());
  EXPECT_THAT(log.warnings().back(),
              HasSubstr("the driver (CUDA 12.4) refuses kernel demo:scale<2> for sm_90a that NVRTC 13.0 made: "
                        "CUDA_ERROR_INVALID_IMAGE (200)"));
}

TEST_F(Module, DevicesThatDoNotFit) {
  expect_error(ErrorCode::unsupported, "cuda:3 (F): expected compute capability 8.0",
               [&] { modules_->load(entry_, 3); });
  expect_error(ErrorCode::unsupported, "needs 100016 bytes of shared memory, cuda:4 (F) has 49152",
               [&] { modules_->load(entry_, 4); });
  expect_error("device: expected cuda:0 to cuda:4, got cuda:5", [&] { modules_->load(entry_, 5); });
  expect_error("got cuda:-1", [&] { modules_->load(entry_, -1); });
}

// One graph for lists that differ in arguments: only the nodes whose arguments have changed are touched.
TEST_F(Module, GraphsTakeOtherArguments) {
  state().args_bytes = sizeof(Args);
  const LoadedKernel& k = modules_->load(entry_, 0);
  int stream = 0;
  LaunchList list;
  // The second launch has a block and shared memory of its own.
  const auto write_down = [&](std::initializer_list<int> values,
                              Launch second = {.grid = {1}, .threads = 64, .shared_bytes = 32}) {
    list.clear();
    for (const int v : values) {
      const Args args{v, {}};
      Launch how = list.items().size() == 1 ? second : Launch{};
      how.grid.x += 4;
      list.add(k, how, &args, sizeof(args));
    }
  };
  write_down({1, 2, 3});
  EXPECT_FALSE(UpdatableGraph().take(list));
  UpdatableGraph graph(list);
  EXPECT_TRUE(graph);
  const auto expect = [&](int updates, int a, int b, int c) {
    ASSERT_TRUE(graph.take(list));
    graph.launch(&stream);
    EXPECT_EQ(state().node_updates, updates);
    EXPECT_THAT(std::vector<int>(state().node_arguments, state().node_arguments + 3), ::testing::ElementsAre(a, b, c));
  };
  expect(0, 1, 2, 3);
  EXPECT_EQ(state().stream, &stream);
  write_down({1, 7, 3});
  expect(1, 1, 7, 3);
  expect(1, 1, 7, 3);
  write_down({4, 5, 6});
  expect(4, 4, 5, 6);

  // Other launches are no matter of arguments.
  write_down({4, 5});
  EXPECT_FALSE(graph.take(list));
  for (const Launch& other :
       {Launch{.grid = {2}, .threads = 64, .shared_bytes = 32}, Launch{.grid = {1}, .threads = 96, .shared_bytes = 32},
        Launch{.grid = {1}, .threads = 64, .shared_bytes = 48},
        Launch{.grid = {1}, .threads = 64, .shared_bytes = 32, .cluster = 2}}) {
    write_down({4, 5, 6}, other);
    EXPECT_FALSE(graph.take(list));
  }
  EXPECT_TRUE(graph);
  EXPECT_EQ(state().node_updates, 4);

  // A refusal in the middle: nobody launches what the nodes hold then.
  write_down({8, 9, 10});
  state().fail_next_update = 2;
  EXPECT_FALSE(graph.take(list));
  EXPECT_FALSE(graph);
  EXPECT_FALSE(graph.take(list));
  EXPECT_EQ(state().graph_launches, 4);
  graph = UpdatableGraph(list);
  expect(4, 8, 9, 10);
  write_down({8, 9, 11});
  expect(5, 8, 9, 11);
}

// Which node is whose launch would be a guess.
TEST_F(Module, GraphsOfEqualLaunchesAreRefused) {
  state().args_bytes = sizeof(Args);
  const LoadedKernel& k = modules_->load(entry_, 0);
  const Args args{1, {}};
  LaunchList list;
  for (int i = 0; i < 2; ++i) list.add(k, {}, &args, sizeof(args));
  expect_error(ErrorCode::unsupported, "expected its launch once in a captured graph, got it more than once",
               [&] { UpdatableGraph graph(list); });
}

// Asked for the same again, nothing goes to the driver; each thread has its own, and a failure is not remembered.
TEST_F(Module, TokenMapsAreMadeOnce) {
  alignas(128) static char memory[2][128];
  const auto of = [](const kernels::TensorMap& map) {
    std::pair<const void*, std::uint64_t> p;
    std::memcpy(&p.first, &map, sizeof p.first);
    std::memcpy(&p.second, reinterpret_cast<const char*>(&map) + sizeof p.first, sizeof p.second);
    return p;
  };
  const auto both = [](int i, std::uint64_t rows) { return std::pair<const void*, std::uint64_t>(memory[i], rows); };
  get_state()->fail_next_map = 1;
  EXPECT_THROW(token_map(memory[0], 5, 16, 16), Error);
  for (int turn = 0; turn < 3; ++turn) {
    EXPECT_EQ(of(token_map(memory[0], 5, 16, 16)), both(0, 5));
    EXPECT_EQ(of(token_map(memory[1], 5, 16, 16)), both(1, 5));
    EXPECT_EQ(of(token_map(memory[0], 6, 16, 16)), both(0, 6));
    EXPECT_EQ(of(token_map(memory[0], 5, 32, 16)), both(0, 5));
    EXPECT_EQ(of(token_map(memory[0], 5, 32, 64)), both(0, 5));
  }
  EXPECT_EQ(get_state()->tensor_maps, 6);
  for (int rows = 1; rows <= 20; ++rows) {  // more than are kept
    EXPECT_EQ(of(token_map(memory[1], rows, 16, 16)), both(1, static_cast<std::uint64_t>(rows)));
  }
  EXPECT_EQ(of(token_map(memory[0], 5, 16, 16)), both(0, 5));
  const int before = get_state()->tensor_maps;
  std::thread([&] { EXPECT_EQ(of(token_map(memory[0], 5, 16, 16)), both(0, 5)); }).join();
  EXPECT_EQ(get_state()->tensor_maps, before + 1);
}

}  // namespace
}  // namespace octomoe::cuda
