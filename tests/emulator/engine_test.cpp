// Whole layers of the CUDA engine on an emulated GPU (driver.h) beside the CPU engine: what the host hands to each
// launch, and in which memory, without a GPU.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "emulator/driver.h"
#include "emulator/kernel_table.h"
#include "emulator/machine.h"
#include "jit/catalogue.h"
#include "jit/kernel_store.h"
#include "jit/key.h"
#include "support/run.h"
#include "support/stages.h"

namespace octomoe::emulator {
namespace {

using testing::expect_any_order;
using testing::LayerCase;
using testing::LayerInput;
using testing::make_input;
using testing::make_weights;
using testing::run_layer;
using testing::same_bits;

const Device kEmulated = Device::cuda(0);
std::uint32_t seed = 0;  // of the schedules
std::string fault;       // of a launch

int launch_by_id(const char* id, int grid, int threads, int shared_bytes, int cluster, const void* args) {
  void (*kernel)(const void*) = nullptr;
  for (const KernelTable* table : {&sm90_gemms(), &few_tokens_kernels(), &row_kernels()}) {
    if (const auto found = table->find(id); found != table->end()) kernel = found->second;
  }
  if (kernel == nullptr) {
    fault += std::string(id) + " is not emulated\n";
    return 1;
  }
  if (cluster > 2 && grid == cluster) grid = cluster = 2;  // see row_kernels()
  try {
    launch({.grid = grid,
            .threads = threads,
            .shared_bytes = shared_bytes,
            .cluster = cluster,
            .schedule = {.seed = seed}},
           [&] { kernel(args); });
  } catch (const Fault& f) {
    fault += std::string(id) + ": " + f.what() + "\n";
    return 1;
  }
  return 0;
}

void encode(void* map, const void* base, const std::uint64_t* sizes, const std::uint64_t* strides,
            const std::uint32_t* box) {
  std::uint64_t size[5], stride[4];
  std::uint32_t side[5];
  std::copy_n(sizes, 5, size);
  std::copy_n(strides, 4, stride);
  std::copy_n(box, 5, side);
  *static_cast<kernels::TensorMap*>(map) = encode_tensor_map(base, size, stride, side);
}

// Its name is none of the GPU suites', which ask for a GPU.
class EmulatedEngine : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    // Loaded under its soname first, it is what the search finds.
    const std::filesystem::path here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    void* library = dlopen((here / "emulated_cuda/libcuda.so.1").c_str(), RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(library, nullptr) << dlerror();
    static const DriverHooks hooks{launch_by_id, encode};
    reinterpret_cast<void (*)(const DriverHooks*)>(dlsym(library, "emulated_cuda_hooks"))(&hooks);
    // A pack whose images are the kernels' names.
    std::vector<jit::PackItem> items;
    for (const KernelEntry& entry : catalogue()) {
      if (std::find(entry.archs.begin(), entry.archs.end(), 90) == entry.archs.end()) continue;
      jit::CompiledKernel k;
      k.id = entry.id;
      k.target = jit::targets_for(entry, 90).front();
      k.source_key = jit::source_key(jit::translate(entry, k.target, jit::SourceSet::embedded()));
      for (const char c : entry.id) k.image.push_back(static_cast<std::byte>(c));
      k.image.push_back(std::byte{0});
      items.push_back({std::move(k), entry});
    }
    const auto bytes = std::make_shared<std::vector<std::byte>>(jit::make_pack(items));
    jit::KernelStore::shared().add_pack(jit::Pack::parse(*bytes, "emulated.pack", bytes));
  }
  void SetUp() override {
    fault.clear();
    seed = 0;
  }
  void TearDown() override { EXPECT_EQ(fault, ""); }

  static LayerCase case_of(const char* scheme, std::int64_t tokens) {
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    c.experts = 5;
    c.hidden = 288;
    c.intermediate = 160;
    c.tokens = tokens;
    c.top_k = 2;
    return c;
  }
  static LayerOptions options() {
    LayerOptions o;
    o.family = KernelFamily::sm90;
    o.replays = 0;
    return o;
  }
};

constexpr const char* kSchemes[] = {"int8_channel", "int8_block", "int8_hybrid"};

void expect_cpu_bits(const LayerCase& c, const LayerOptions& o, DType out = DType::bfloat16) {
  SCOPED_TRACE(to_string(c.scheme) + ", " + std::to_string(c.tokens) + " tokens");
  ++seed;
  const MoeWeights w = make_weights(c, c.experts);
  const LayerInput in = make_input(c);
  EXPECT_TRUE(same_bits(run_layer(kEmulated, w, o, in, out), run_layer(Device::cpu(), w, o, in, out)));
}

// By the kernels for a few tokens, and by launches.
TEST_F(EmulatedEngine, LayersEqualTheCpu) {
  for (const char* scheme :
       {"int8_channel", "int8_channel:static", "int8_channel:asymmetric", "int8_block", "int8_block:block_k=256",
        "int8_hybrid", "int8_hybrid:block_k=256", "int8_hybrid:super=1"}) {
    for (const std::int64_t tokens : {1, 3, 30, 150}) expect_cpu_bits(case_of(scheme, tokens), options());
  }
}

TEST_F(EmulatedEngine, StepsByKernelsOfTheirOwn) {
  for (const char* scheme : kSchemes) {
    for (int i = 0; i < 4; ++i) {
      SCOPED_TRACE(i);
      LayerOptions o = options();
      o.fused_gather = i != 0;
      o.fused_activation = i != 1;
      o.fused_requantize = i != 2;
      o.router_weight_on_input = i == 3;
      LayerCase c = case_of(scheme, 40);
      c.intermediate = 128;
      c.biases = i == 1;
      if (i == 3) c.activation = Activation::geglu_tanh;
      expect_cpu_bits(c, o, i == 2 ? DType::float32 : DType::float16);
    }
  }
}

TEST_F(EmulatedEngine, PanelsAndSharedExperts) {
  for (const char* scheme : kSchemes) {
    LayerCase c = case_of(scheme, 70);
    LayerOptions o = options();
    LayerCase other = c;
    other.intermediate = 96;
    o.shared_expert = make_weights(other, 1);
    o.shared_gate = testing::random_tensor(DType::bfloat16, {c.hidden}, 5, 0.1f);
    expect_cpu_bits(c, o);
    c.hidden = 256;
    c.intermediate = 128;
    o = options();
    o.prepack = true;
    expect_cpu_bits(c, o);
  }
}

// More routes than one CTA sorts.
TEST_F(EmulatedEngine, ManyRoutes) {
  LayerCase c = case_of("int8_channel", 1100);
  c.experts = 64;
  c.hidden = 64;
  c.intermediate = 32;
  expect_cpu_bits(c, options());
}

// With and without a shared expert and its gate, weights on the input, experts that are elsewhere; into bf16 and fp16.
TEST_F(EmulatedEngine, RowsAddedInAnyOrder) {
  for (const char* scheme : kSchemes) {
    for (int i = 0; i < 5; ++i) {
      SCOPED_TRACE(std::string(scheme) + ", " + std::to_string(i));
      ++seed;
      const LayerCase c = case_of(scheme, i == 0 ? 30 : 150);
      const MoeWeights w = make_weights(c, c.experts);
      LayerInput in = make_input(c, DType::bfloat16, true, i % 2 == 0 ? 1.0f : testing::kSmall);
      LayerOptions o = options();
      o.combine_order = CombineOrder::any;
      if (i == 1) {
        o.expert_map = Tensor::empty(DType::int32, {9});
        for (int e = 0; e < 9; ++e) o.expert_map.as<std::int32_t>()[e] = e % 2 == 0 ? -1 : e / 2;
        in.ids = testing::random_ids(c.tokens, c.top_k, 9, 3, true);
      }
      o.router_weight_on_input = i == 2;
      if (i >= 3) {
        LayerCase other = c;
        other.intermediate = 96;
        o.shared_expert = make_weights(other, 1);
      }
      if (i == 4) o.shared_gate = testing::random_tensor(DType::bfloat16, {c.hidden}, 5, 0.1f);
      testing::Stages stages;
      {
        const cuda::Observe observe(stages);
        const Tensor out = run_layer(kEmulated, w, o, in, i % 2 == 0 ? DType::bfloat16 : DType::float16);
        expect_any_order(out, w, o, in);
      }
      EXPECT_EQ(stages.count("combine"), 0);
    }
  }
}

// One layer, call after call: an output that is added to, one that was there before, and such as cannot be added to.
TEST_F(EmulatedEngine, AnyOrderCallAfterCall) {
  const LayerCase c = case_of("int8_channel", 60);
  const MoeWeights w = make_weights(c, c.experts);
  LayerInput in = make_input(c);
  LayerOptions o = options();
  o.combine_order = CombineOrder::any;
  MoeLayer layer(kEmulated, w, o);
  for (int i = 0; i < 3; ++i) {
    ++seed;
    const Tensor out = testing::nan_tensor(DType::bfloat16, {c.tokens, c.hidden});
    testing::forward(kEmulated, layer, in.x, in.ids, in.weights, out);
    expect_any_order(out, w, o, in);
    const Tensor before = Tensor::copy_of(out);
    testing::forward(kEmulated, layer, in.x, in.ids, in.weights, out, {.accumulate = true});
    expect_any_order(out, w, o, in, before);
    const Tensor exact = Tensor::empty(DType::float32, {c.tokens, c.hidden});
    testing::forward(kEmulated, layer, in.x, in.ids, in.weights, exact);
    EXPECT_TRUE(same_bits(exact, run_layer(Device::cpu(), w, {}, in, DType::float32)));
  }
  for (std::int64_t i = 0; i < in.ids.elems(); ++i) in.ids.as<std::int32_t>()[i] = -1;
  EXPECT_TRUE(same_bits(run_layer(kEmulated, w, o, in), Tensor::zeros(DType::bfloat16, {c.tokens, c.hidden})));
}

}  // namespace
}  // namespace octomoe::emulator
