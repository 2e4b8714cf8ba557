// What a call may touch: its output and workspace, whatever lay in them before, and nothing beside them; a token its
// own row; a GPU its own memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "support/run.h"

namespace octomoe::testing {
namespace {

constexpr std::uint8_t kPoison = 0xa5;
constexpr std::int64_t kGuard = 4096;  // bytes before and behind

class Memory : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!is_here(kGpu)) GTEST_SKIP() << "no GPU here";
  }
};

// Device memory in the middle of poisoned bytes.
struct Guarded {
  explicit Guarded(std::int64_t bytes, Device device = kGpu) : size(bytes) {
    const Tensor host = Tensor::empty(DType::uint8, {bytes + 2 * kGuard});
    std::memset(host.view().data(), kPoison, host.bytes());
    all = Tensor::copy_of(host, device);
  }
  void* data() const { return all.as<std::uint8_t>() + kGuard; }
  // Bytes of the guards that were written.
  std::int64_t broken() const {
    const Tensor host = Tensor::copy_of(all);
    const std::uint8_t* p = host.as<std::uint8_t>();
    const auto written = [](std::uint8_t b) { return b != kPoison; };
    return std::count_if(p, p + kGuard, written) + std::count_if(p + kGuard + size, p + size + 2 * kGuard, written);
  }
  std::int64_t size;
  Tensor all;
};

LayerCase case_of(const char* scheme, std::int64_t tokens) {
  LayerCase c;
  c.scheme = Scheme::parse(scheme);
  c.experts = 12;
  c.hidden = 288;
  c.intermediate = 160;
  c.tokens = tokens;
  c.top_k = 3;
  c.seed = static_cast<std::uint32_t>(tokens);
  return c;
}

// A workspace full of garbage between guards; out has guards of its own.
TEST_P(Memory, NothingBesideOutAndWorkspaceIsWritten) {
  for (const KernelFamily family : {KernelFamily::automatic, KernelFamily::sm80}) {
    for (const std::int64_t tokens : {1, 3, 17, 150, 700}) {
      SCOPED_TRACE(tokens);
      const LayerCase c = case_of(GetParam(), tokens);
      const MoeWeights w = make_weights(c, c.experts);
      const LayerInput in = make_input(c);
      LayerOptions o;
      o.family = family;
      MoeLayer layer(kGpu, w, o);
      GuardedOutput out(DType::bfloat16, tokens, c.hidden, kGpu);
      const Guarded workspace(static_cast<std::int64_t>(layer.workspace_bytes(tokens, c.top_k)));
      layer.forward(on(kGpu, in.x), on(kGpu, in.ids), on(kGpu, in.weights), out.view(),
                    {.workspace = TensorView(workspace.data(), DType::uint8, {workspace.size}, kGpu)});
      EXPECT_EQ(workspace.broken(), 0);
      EXPECT_TRUE(out.intact());
      EXPECT_TRUE(same_bits(out.dense(), run_layer(Device::cpu(), w, {}, in)));
    }
  }
}

// A token of NaNs or infinities changes no other token's bits.
TEST_P(Memory, NanTokensStayAlone) {
  for (const std::int64_t tokens : {4, 90}) {
    const LayerCase c = case_of(GetParam(), tokens);
    const MoeWeights w = make_weights(c, c.experts);
    const LayerInput clean = make_input(c);
    LayerInput in = clean;
    in.x = Tensor::copy_of(clean.x);
    const std::int64_t bad = tokens / 2, size = static_cast<std::int64_t>(size_bytes(in.x.dtype()));
    std::memset(in.x.as<std::uint8_t>() + bad * c.hidden * size, 0xff, static_cast<std::size_t>(c.hidden * size));
    const Tensor got = run_layer(kGpu, w, {}, in), want = run_layer(kGpu, w, {}, clean);
    EXPECT_TRUE(same_bits(got, run_layer(Device::cpu(), w, {}, in)));
    for (std::int64_t t = 0; t < tokens; ++t) {
      const bool same = std::memcmp(got.as<std::uint16_t>() + t * c.hidden, want.as<std::uint16_t>() + t * c.hidden,
                                    static_cast<std::size_t>(c.hidden) * 2) == 0;
      EXPECT_EQ(same, t != bad) << t;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Schemes, Memory,
                         ::testing::Values("int8_channel", "int8_channel:asymmetric", "int8_block", "int8_hybrid"));

// A layer on each GPU, a host thread each, at once.
TEST(Gpus, EachByAThreadOfItsOwn) {
  if (!is_here(kGpu)) GTEST_SKIP() << "no GPU here";
  const int count = std::min(cuda::driver().device_count, 4);
  if (count < 2) GTEST_SKIP() << "one GPU here";
  std::vector<std::thread> threads;
  std::vector<int> wrong(static_cast<std::size_t>(count), -1);
  for (int d = 0; d < count; ++d) {
    threads.emplace_back([&, d] {
      const Device device = Device::cuda(d);
      int failures = 0;
      for (const std::int64_t tokens : {2, 60, 900}) {
        LayerCase c = case_of(d % 2 ? "int8_block" : "int8_channel", tokens);
        c.seed += static_cast<std::uint32_t>(d);
        const MoeWeights w = make_weights(c, c.experts);
        const LayerInput in = make_input(c);
        const Tensor want = run_layer(Device::cpu(), w, {}, in);
        MoeLayer layer(device, w);
        const Tensor x = on(device, in.x), ids = on(device, in.ids), weights = on(device, in.weights);
        const Tensor out = Tensor::zeros(DType::bfloat16, {tokens, c.hidden}, device);
        for (int i = 0; i < 50; ++i) layer.forward(x, ids, weights, out);
        failures += !same_bits(Tensor::copy_of(out), want);
      }
      wrong[static_cast<std::size_t>(d)] = failures;
    });
  }
  for (std::thread& t : threads) t.join();
  for (int d = 0; d < count; ++d) EXPECT_EQ(wrong[static_cast<std::size_t>(d)], 0) << "GPU " << d;
}

}  // namespace
}  // namespace octomoe::testing
