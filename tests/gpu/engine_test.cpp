// What only a GPU can get wrong: sizes of real models against the CPU engine, graphs, streams, ids in device memory,
// workspaces. tests/layer runs the cases that all engines share.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>

#include "cuda/memory.h"
#include "cuda/stream.h"
#include "support/errors.h"
#include "support/run.h"

namespace octomoe::testing {
namespace {

class Gpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!is_here(kGpu)) GTEST_SKIP() << "no GPU here";
  }
};
class GpuScheme : public Gpu, public ::testing::WithParamInterface<const char*> {
 protected:
  Scheme scheme = Scheme::parse(GetParam());
};
// The name by which scripts/gpu.sh finds the suite for compute-sanitizer.
class Sanitized : public GpuScheme {};

LayerCase case_of(const Scheme& scheme, std::int64_t experts, std::int64_t hidden, std::int64_t intermediate,
                  std::int64_t tokens, int top_k, std::uint32_t seed = 3) {
  LayerCase c;
  c.scheme = scheme;
  c.experts = experts;
  c.hidden = hidden;
  c.intermediate = intermediate;
  c.tokens = tokens;
  c.top_k = top_k;
  c.seed = seed;
  return c;
}

void expect_cpu_bits(const LayerCase& c, const LayerOptions& o = {}) {
  const MoeWeights w = make_weights(c, c.experts);
  const LayerInput in = make_input(c);
  EXPECT_TRUE(same_bits(run_layer(kGpu, w, o, in), run_layer(Device::cpu(), w, o, in)));
}

TEST_P(Sanitized, SmallLayersEqualTheCpu) {
  for (const std::int64_t tokens : {1, 5, 40, 200}) {
    SCOPED_TRACE(tokens);
    expect_cpu_bits(case_of(scheme, 6, 256, 96, tokens, 2));
  }
  LayerOptions prepacked;
  prepacked.prepack = true;
  for (const std::int64_t tokens : {2, 90}) expect_cpu_bits(case_of(scheme, 6, 256, 128, tokens, 2), prepacked);
  LayerOptions any;
  any.combine_order = CombineOrder::any;
  for (const std::int64_t tokens : {40, 200}) {
    const LayerCase c = case_of(scheme, 6, 256, 96, tokens, 2);
    const MoeWeights w = make_weights(c, c.experts);
    expect_any_order(run_layer(kGpu, w, any, make_input(c)), w, any, make_input(c));
  }
  LayerCase c = case_of(scheme, 4, 128, 64, 9, 3);
  c.activation = Activation::geglu_tanh;
  c.biases = true;
  LayerOptions o;
  o.router_weight_on_input = true;
  o.shared_expert = make_weights(case_of(scheme, 1, 128, 160, 9, 1), 1);
  o.shared_gate = random_tensor(DType::bfloat16, {128}, 5, 0.1f);
  expect_cpu_bits(c, o);
}

TEST_P(GpuScheme, ModelSizedLayersEqualTheCpu) {
  for (const std::int64_t tokens : {1, 4, 17, 64, 300, 1000}) {
    SCOPED_TRACE(tokens);
    expect_cpu_bits(case_of(scheme, 32, 2048, 768, tokens, 8));
  }
  expect_cpu_bits(case_of(scheme, 4, 7168, 2048, 70, 2));
  expect_cpu_bits(case_of(scheme, 256, 512, 192, 900, 6));
  expect_cpu_bits(case_of(scheme, 2, 512, 64, 65536, 1));
}

TEST_P(GpuScheme, FusionChangesNoBit) {
  const LayerCase c = case_of(scheme, 8, 256, 192, 70, 3);
  const MoeWeights w = make_weights(c, c.experts);
  const LayerInput in = make_input(c);
  const Tensor want = run_layer(kGpu, w, {}, in);
  for (const bool gather : {false, true}) {
    for (const bool activation : {false, true}) {
      for (const bool requantize : {false, true}) {
        LayerOptions o;
        o.fused_gather = gather;
        o.fused_activation = activation;
        o.fused_requantize = requantize;
        EXPECT_TRUE(same_bits(run_layer(kGpu, w, o, in), want)) << gather << activation << requantize;
      }
    }
  }
}

TEST_P(GpuScheme, HundredRunsAreOneResult) {
  const LayerCase c = case_of(scheme, 16, 512, 192, 130, 4);
  MoeLayer layer(kGpu, make_weights(c, c.experts));
  const LayerInput in = make_input(c);
  const Tensor x = on(kGpu, in.x), ids = on(kGpu, in.ids), weights = on(kGpu, in.weights);
  Tensor first;
  for (int i = 0; i < 100; ++i) {
    const Tensor out = Tensor::zeros(DType::bfloat16, in.x.shape(), kGpu);
    layer.forward(x, ids, weights, out);
    const Tensor got = Tensor::copy_of(out);
    if (i == 0) first = got;
    ASSERT_TRUE(same_bits(got, first)) << i;
  }
}

TEST_P(GpuScheme, GraphReplaysWithOtherRoutings) {
  const LayerCase c = case_of(scheme, 16, 256, 192, 50, 4);
  const MoeWeights w = make_weights(c, c.experts);
  MoeLayer layer(kGpu, w);
  const LayerInput in = make_input(c);
  const Tensor x = on(kGpu, in.x), ids = on(kGpu, in.ids), weights = on(kGpu, in.weights);
  const Tensor out = Tensor::zeros(DType::bfloat16, in.x.shape(), kGpu);
  const cuda::ContextGuard context(cuda::device_info(0));
  const cuda::OwnedStream stream;
  expect_error("workspace: expected one of",
               [&] { cuda::Graph::capture(stream, [&] { layer.forward(x, ids, weights, out, {}, stream); }); });
  layer.reserve(c.tokens, c.top_k);
  const auto graph = cuda::Graph::capture(stream, [&] { layer.forward(x, ids, weights, out, {}, stream); });
  for (std::uint32_t seed = 1; seed < 6; ++seed) {
    LayerInput next = make_input(c);
    next.ids = random_ids(c.tokens, c.top_k, c.experts, seed, true);
    OCTOMOE_CUDA(cuMemcpyHtoD, reinterpret_cast<cuda::CuDevicePtr>(ids.view().data()), next.ids.view().data(),
                 next.ids.bytes());
    graph.launch(stream);
    stream.synchronize();
    EXPECT_TRUE(same_bits(Tensor::copy_of(out), run_layer(Device::cpu(), w, {}, next))) << seed;
  }
}

TEST_P(GpuScheme, TwoStreamsAtOnce) {
  const LayerCase c = case_of(scheme, 16, 512, 192, 150, 4);
  const MoeWeights w = make_weights(c, c.experts);
  MoeLayer layer(kGpu, w);
  const cuda::ContextGuard context(cuda::device_info(0));
  const cuda::OwnedStream streams[2];
  LayerInput in[2];
  Tensor x[2], ids[2], weights[2], out[2];
  for (std::uint32_t s = 0; s < 2; ++s) {
    LayerCase mine = c;
    mine.seed = 10 + s;
    in[s] = make_input(mine);
    x[s] = on(kGpu, in[s].x);
    ids[s] = on(kGpu, in[s].ids);
    weights[s] = on(kGpu, in[s].weights);
    out[s] = Tensor::zeros(DType::bfloat16, in[s].x.shape(), kGpu);
  }
  for (int i = 0; i < 50; ++i) {
    for (int s = 0; s < 2; ++s) layer.forward(x[s], ids[s], weights[s], out[s], {}, streams[s]);
  }
  for (int s = 0; s < 2; ++s) {
    streams[s].synchronize();
    EXPECT_TRUE(same_bits(Tensor::copy_of(out[s]), run_layer(Device::cpu(), w, {}, in[s]))) << s;
  }
}

INSTANTIATE_TEST_SUITE_P(Schemes, Sanitized,
                         ::testing::Values("int8_channel", "int8_channel:asymmetric", "int8_block", "int8_hybrid",
                                           "int8_hybrid:block=32,super=2"));
INSTANTIATE_TEST_SUITE_P(Schemes, GpuScheme, ::testing::Values("int8_channel", "int8_block", "int8_hybrid"));

TEST_F(Gpu, IdsOutOfRange) {
  const LayerCase c = case_of(Scheme::int8_channel(), 8, 128, 96, 13, 3);
  const MoeWeights w = make_weights(c, c.experts);
  LayerInput in = make_input(c);
  LayerInput clean = in;
  clean.ids = Tensor::copy_of(in.ids);
  const std::int32_t wild[] = {8, 1 << 30, -2, INT32_MIN};
  for (int i = 0; i < 4; ++i) {
    in.ids.as<std::int32_t>()[5 * i] = wild[i];
    clean.ids.as<std::int32_t>()[5 * i] = -1;
  }
  EXPECT_TRUE(same_bits(run_layer(kGpu, w, {}, in), run_layer(Device::cpu(), w, {}, clean)));
  MoeLayer layer(kGpu, w);
  const Tensor out = Tensor::zeros(DType::bfloat16, in.x.shape(), kGpu);
  const Tensor before = Tensor::copy_of(out);
  expect_error("topk_ids: expected expert ids in -1..7, got 8 at token 0, slot 0", [&] {
    layer.forward(on(kGpu, in.x), on(kGpu, in.ids), on(kGpu, in.weights), out, {.check_ids = true});
  });
  EXPECT_TRUE(same_bits(Tensor::copy_of(out), before));
}

TEST_F(Gpu, Workspaces) {
  const LayerCase c = case_of(Scheme::int8_channel(), 8, 128, 96, 13, 3);
  const MoeWeights w = make_weights(c, c.experts);
  const LayerInput in = make_input(c);
  MoeLayer layer(kGpu, w);
  const auto bytes = static_cast<std::int64_t>(layer.workspace_bytes(c.tokens, c.top_k));
  const Tensor memory = Tensor::empty(DType::uint8, {bytes}, kGpu);
  const Tensor out = Tensor::zeros(DType::bfloat16, in.x.shape(), kGpu);
  layer.forward(on(kGpu, in.x), on(kGpu, in.ids), on(kGpu, in.weights), out, {.workspace = memory});
  EXPECT_TRUE(same_bits(Tensor::copy_of(out), run_layer(Device::cpu(), w, {}, in)));
  const auto with = [&](TensorView workspace) {
    layer.forward(on(kGpu, in.x), on(kGpu, in.ids), on(kGpu, in.weights), out, {.workspace = workspace});
  };
  expect_error("workspace: expected at least", [&] { with(memory.view().slice(0, bytes - 1)); });
  expect_error("workspace: expected a tensor on cuda:0", [&] { with(Tensor::empty(DType::uint8, {bytes})); });
}

TEST_F(Gpu, WrongDevice) {
  const LayerCase c = case_of(Scheme::int8_channel(), 8, 128, 96, 13, 3);
  const LayerInput in = make_input(c);
  MoeLayer layer(kGpu, make_weights(c, c.experts));
  const Tensor out = Tensor::zeros(DType::bfloat16, in.x.shape(), kGpu);
  expect_error("x: expected a tensor on cuda:0, got one on cpu",
               [&] { layer.forward(in.x, on(kGpu, in.ids), on(kGpu, in.weights), out); });
  expect_error(ErrorCode::unsupported, "scheme: expected int8_channel, int8_block or int8_hybrid on cuda:0, got bf16",
               [&] { MoeLayer(kGpu, make_weights(case_of(Scheme::bf16(), 8, 128, 96, 13, 3), 8)); });
}

TEST_F(Gpu, AnExpertOf4GiB) {
  const std::int64_t n = 65536, k = 65536;
  const Tensor byte = Tensor::empty(DType::int8, {1}, kGpu);  // nobody looks at the others
  const TensorView view(byte.view().data(), DType::int8, {1, n, k}, kGpu);
  QuantizedMatrix m =
      adopt_matrix(Scheme::int8_channel(), Tensor::wrap(view, nullptr), Tensor::zeros(DType::float32, {1, n}).view());
  expect_error(ErrorCode::unsupported, "b: expected less than 4 GiB an expert on cuda:0, got 65536 x 65536",
               [&] { PreparedMatrix(kGpu, std::move(m)); });
}

TEST_F(Gpu, WeightsOnTheDeviceAreUsedWhereTheyLie) {
  const LayerCase c = case_of(Scheme::int8_hybrid(), 8, 256, 192, 40, 3);
  const MoeWeights host = make_weights(c, c.experts);
  const Tensor w13 = on(kGpu, host.w13.values), w2 = on(kGpu, host.w2.values);
  const MoeWeights there = MoeWeights::from_int8_hybrid(w13, on(kGpu, host.w13.scale), on(kGpu, host.w13.q), w2,
                                                        on(kGpu, host.w2.scale), on(kGpu, host.w2.q));
  EXPECT_EQ(there.w13.values.view().data(), w13.view().data());
  const LayerInput in = make_input(c);
  EXPECT_TRUE(same_bits(run_layer(kGpu, there, {}, in), run_layer(Device::cpu(), host, {}, in)));
}

TEST_F(Gpu, RoutesLikeTheCpu) {
  std::mt19937 random(1);
  for (int i = 0; i < 40; ++i) {
    const std::int64_t experts = (i % 4 + 1) * (i % 3 == 0 ? 64 : 40), tokens = 1 + i * 7;
    const Tensor logits =
        random_tensor(static_cast<DType>(i % 3), {tokens, experts}, 100 + static_cast<unsigned>(i), 2.0f);
    const Tensor bias = random_tensor(DType::float32, {experts}, 7, 0.1f);
    RouteOptions o;
    o.scoring = i % 2 ? Scoring::sigmoid : Scoring::softmax;
    o.renormalize = static_cast<Renormalize>(i % 3);
    o.renormalize_min = 1e-12f;
    o.scaling_factor = i % 5 == 0 ? 2.5f : 1.0f;
    const std::int64_t k = 1 + i % 8;
    if (i % 4 == 1) {
      o.groups = 8;
      o.topk_groups = 4;
    }
    if (i % 2) o.correction_bias = bias;
    const Tensor w = Tensor::zeros(DType::float32, {tokens, k}), ids = Tensor::zeros(DType::int32, {tokens, k});
    route(logits, w, ids, o);
    const Tensor bias_there = on(kGpu, bias);
    if (o.correction_bias.defined()) o.correction_bias = bias_there;
    const Tensor w2 = Tensor::zeros(DType::float32, {tokens, k}, kGpu),
                 ids2 = Tensor::zeros(DType::int32, {tokens, k}, kGpu);
    route(on(kGpu, logits), w2, ids2, o);
    EXPECT_TRUE(same_bits(Tensor::copy_of(w2), w)) << i;
    EXPECT_TRUE(same_bits(Tensor::copy_of(ids2), ids)) << i;
  }
}

// Offsets beyond 2^32 bytes of weights: the last experts of 4.6 GB.
TEST_F(Gpu, WeightsBeyondFourGigabytes) {
  const std::int64_t experts = 140, n = 8192, k = 4096, rows = 24;
  const Tensor one = random_int8({2, n, k}, 5, -127, 127);
  const Tensor values = Tensor::empty(DType::int8, {experts, n, k}, kGpu);
  cuda::copy(one, values.view().slice(experts - 2, 2));
  const Tensor scale = random_tensor(DType::float32, {experts, n}, 6, 0.0f);
  for (std::int64_t i = 0; i < scale.elems(); ++i) scale.as<float>()[i] = 0.01f * static_cast<float>(1 + i % 7);
  const PreparedMatrix big(kGpu, adopt_matrix(Scheme::int8_channel(), values, scale));
  const PreparedMatrix small(Device::cpu(),
                             adopt_matrix(Scheme::int8_channel(), one, scale.view().slice(experts - 2, 2)));
  Tensor offsets = Tensor::zeros(DType::int32, {experts + 1});
  offsets.as<std::int32_t>()[experts - 1] = 10;
  offsets.as<std::int32_t>()[experts] = rows;
  const Tensor a = random_tensor(DType::bfloat16, {rows, k}, 8);
  Tensor got = Tensor::zeros(DType::float32, {rows, n}), want = Tensor::zeros(DType::float32, {rows, n});
  gemm(kGpu, {a, {}, {}, {}}, big, got, Groups::offsets(offsets));
  grouped_gemm({a, {}, {}, {}}, small, want, Groups::offsets(offsets.view().slice(experts - 2, 3)));
  EXPECT_TRUE(same_bits(got, want));
}

}  // namespace
}  // namespace octomoe::testing
