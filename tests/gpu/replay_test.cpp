// Calls that a layer makes by graphs of its own: the same bits as kernel by kernel, whatever happens in between.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/memory.h"
#include "cuda/stream.h"
#include "support/errors.h"
#include "support/run.h"

namespace octomoe::testing {
namespace {

constexpr int kRepeats = 20;  // more than enough calls for a layer to make a graph

// Counts the driver's launches and node updates while it lives.
class Launches {
 public:
  Launches() : driver_(const_cast<cuda::Driver&>(cuda::driver())) {
    kernel_ = driver_.cuLaunchKernelEx;
    graph_ = driver_.cuGraphLaunch;
    kernels = clusters = graphs = updates = 0;
    driver_.cuLaunchKernelEx = [](const cuda::CuLaunchConfig* c, cuda::CuFunction f, void** p, void** extra) {
      ++kernels;
      for (unsigned i = 0; i < c->attribute_count; ++i) clusters += c->attributes[i].id == cuda::kLaunchCluster;
      return kernel_(c, f, p, extra);
    };
    driver_.cuGraphLaunch = [](cuda::CuGraphExec g, cuda::CuStream s) {
      ++graphs;
      return graph_(g, s);
    };
    update_ = driver_.cuGraphExecKernelNodeSetParams;
    driver_.cuGraphExecKernelNodeSetParams = [](cuda::CuGraphExec g, cuda::CuGraphNode n,
                                                const cuda::CuKernelNodeParams* p) {
      ++updates;
      return update_result != 0 ? update_result.load() : update_(g, n, p);
    };
  }
  ~Launches() {
    driver_.cuLaunchKernelEx = kernel_;
    driver_.cuGraphLaunch = graph_;
    driver_.cuGraphExecKernelNodeSetParams = update_;
    update_result = 0;
  }
  Launches(const Launches&) = delete;
  Launches& operator=(const Launches&) = delete;
  static inline std::atomic<int> kernels, clusters, graphs, updates;
  static inline std::atomic<int> update_result = 0;  // of cuGraphExecKernelNodeSetParams, in the driver's place

 private:
  cuda::Driver& driver_;
  static inline decltype(cuda::Driver::cuLaunchKernelEx) kernel_;
  static inline decltype(cuda::Driver::cuGraphLaunch) graph_;
  static inline decltype(cuda::Driver::cuGraphExecKernelNodeSetParams) update_;
};

// A call's tensors on the GPU, and what the CPU makes of them.
struct Call {
  Call(const LayerCase& c, const MoeWeights& w) : problem(c), weights_of(w) {
    fill(c.seed);
    out = Tensor::zeros(DType::bfloat16, {c.tokens, c.hidden}, kGpu);
  }
  // Other contents in the same memory.
  void fill(std::uint32_t seed) {
    LayerCase c = problem;
    c.seed = seed;
    const LayerInput in = make_input(c);
    const auto put = [](Tensor& to, const Tensor& from) {
      if (to.defined())
        cuda::copy(from, to);
      else
        to = on(kGpu, from);
    };
    put(x, in.x);
    put(ids, in.ids);
    put(weights, in.weights);
    expected = run_layer(Device::cpu(), weights_of, {}, in);
  }
  void run(MoeLayer& layer, Stream stream = nullptr, const ForwardOptions& options = {}) {
    layer.forward(x, ids, weights, out, options, stream);
  }
  bool right() const { return same_bits(Tensor::copy_of(out), expected); }

  LayerCase problem;
  const MoeWeights& weights_of;
  Tensor x, ids, weights, out, expected;
};

class Replay : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!is_here(kGpu)) GTEST_SKIP() << "no GPU here";
    context_ = std::make_unique<cuda::ContextGuard>(cuda::device_info(0));
    weights_ = make_weights(problem(1), 8);
  }
  static LayerCase problem(std::int64_t tokens, std::uint32_t seed = 1) {
    LayerCase c;
    c.hidden = 256;
    c.intermediate = 96;
    c.tokens = tokens;
    c.top_k = 2;
    c.seed = seed;
    return c;
  }
  MoeWeights weights_;
  std::unique_ptr<cuda::ContextGuard> context_;
};
using SanitizedReplay = Replay;

TEST_F(SanitizedReplay, OtherContentsInTheSameMemory) {
  MoeLayer layer(kGpu, weights_);
  Call call(problem(9), weights_);
  const cuda::OwnedStream stream;
  const Launches launches;
  for (std::uint32_t i = 0; i < kRepeats; ++i) {
    call.fill(100 + i);
    call.run(layer, stream);
    stream.synchronize();
    ASSERT_TRUE(call.right()) << i;
  }
  EXPECT_GT(Launches::graphs, kRepeats / 2);
  EXPECT_EQ(Launches::kernels, 6 * (kRepeats - Launches::graphs + 1));  // each eager call, and the capture
}

TEST_F(Replay, CanBeSwitchedOff) {
  LayerOptions o;
  o.replays = 0;
  MoeLayer layer(kGpu, weights_, o);
  Call call(problem(9), weights_);
  const Launches launches;
  for (int i = 0; i < kRepeats; ++i) call.run(layer);
  EXPECT_TRUE(call.right());
  EXPECT_EQ(Launches::graphs, 0);
  o.replays = 65;
  expect_error("replays: expected 0..64, got 65", [&] { MoeLayer(kGpu, weights_, o); });
}

TEST_F(Replay, CallsThatDifferInWhatever) {
  MoeLayer layer(kGpu, weights_);
  Call one(problem(9, 2), weights_), other(problem(9, 3), weights_), fewer(problem(5, 4), weights_);
  Call strided(problem(9, 5), weights_);
  const Tensor wide = Tensor::zeros(DType::bfloat16, {9, 512}, kGpu);
  const TensorView rows(wide.view().data(), DType::bfloat16, {9, 256}, {512, 1}, kGpu);
  const Tensor f32 = Tensor::zeros(DType::float32, {9, 256}, kGpu), sum = Tensor::zeros(DType::float32, {9, 256}, kGpu);
  const Tensor memory = Tensor::empty(DType::uint8, {static_cast<std::int64_t>(layer.workspace_bytes(9, 2))}, kGpu);
  const Launches launches;
  for (int i = 0; i < kRepeats; ++i) {
    one.run(layer);
    other.run(layer);
    fewer.run(layer);
    other.run(layer, nullptr, {.workspace = memory});
    layer.forward(strided.x, strided.ids, strided.weights, rows);
    layer.forward(one.x, one.ids, one.weights, f32);
    layer.forward(one.x, one.ids, one.weights, sum, {.accumulate = true});
  }
  EXPECT_GT(Launches::graphs, 7 * kRepeats / 2);
  EXPECT_TRUE(one.right() && other.right() && fewer.right());
  EXPECT_TRUE(same_bits(Tensor::copy_of(Tensor::copy_of(rows, kGpu)), strided.expected));
  const Tensor once = Tensor::copy_of(f32), all = Tensor::copy_of(sum);
  float want = 0;
  for (int i = 0; i < kRepeats; ++i) want += once.as<float>()[7];
  EXPECT_EQ(all.as<float>()[7], want);
}

// Nothing waits in between: a graph in flight keeps the arguments that it was launched with.
TEST_F(SanitizedReplay, OtherMemoryForEachCall) {
  MoeLayer layer(kGpu, weights_);
  constexpr std::uint32_t kCalls = 12;
  std::vector<Call> calls;
  std::vector<Tensor> memory;
  for (std::uint32_t i = 0; i < kCalls; ++i) {
    calls.emplace_back(problem(40, 40 + i), weights_);
    memory.push_back(Tensor::empty(DType::uint8, {static_cast<std::int64_t>(layer.workspace_bytes(40, 2))}, kGpu));
  }
  const cuda::OwnedStream stream;
  const Launches launches;
  for (int round = 0; round < 2; ++round) {
    for (std::uint32_t i = 0; i < kCalls; ++i) calls[i].run(layer, stream, {.workspace = memory[i]});
  }
  stream.synchronize();
  EXPECT_GT(Launches::graphs, 2 * static_cast<int>(kCalls) - 5);
  for (const Call& c : calls) EXPECT_TRUE(c.right());
}

// The driver refuses some updates: the graph is made anew, and no call runs with what the old one held.
TEST_F(Replay, UpdatesThatFail) {
  MoeLayer layer(kGpu, weights_);
  Call one(problem(9, 2), weights_), other(problem(9, 3), weights_);
  const cuda::OwnedStream stream;
  const Launches launches;
  for (int i = 0; i < kRepeats; ++i) {
    for (const Call* c : {&one, &other}) cuda::fill_zero(c->out.view().data(), c->out.bytes(), 0);
    Launches::update_result = i % 3 == 2 ? cuda::kCudaInvalidValue : 0;
    one.run(layer, stream);
    other.run(layer, stream);
    stream.synchronize();
    ASSERT_TRUE(one.right() && other.right()) << i;
  }
  EXPECT_GT(Launches::updates, kRepeats);
  EXPECT_EQ(Launches::graphs, 2 * kRepeats - 2);
}

// Calls of one layer that have nothing in common but T, k and the stream, against a layer without graphs. Nothing waits
// in between.
class OtherTensors {
 public:
  OtherTensors(const LayerCase& c, const MoeWeights& w, LayerOptions o) : kept_(kGpu, w, o) {
    o.replays = 0;
    MoeLayer plain(kGpu, w, o);
    for (std::uint32_t i = 0; i < kKinds; ++i) {
      LayerCase other = c;
      other.seed = 70 + i;
      const LayerInput in = make_input(other, kTypes[i % 3]);
      Given g;
      g.x = on(kGpu, in.x);
      g.weights = on(kGpu, in.weights);
      g.ids = on(kGpu, i % 2 == 0 ? in.ids : wide(in.ids));
      const std::int64_t stride = c.hidden * (i == 3 ? 2 : 1);
      for (Tensor* t : {&g.out, &g.want}) *t = Tensor::zeros(kTypes[(i + 1) % 3], {c.tokens, stride}, kGpu);
      g.shape = {c.tokens, c.hidden};
      g.accumulate = i >= 3;
      if (i == 1 || i == 4) {
        g.memory =
            Tensor::empty(DType::uint8, {static_cast<std::int64_t>(kept_.workspace_bytes(c.tokens, c.top_k))}, kGpu);
      }
      given_.push_back(g);
    }
    for (int round = 0; round < kRounds; ++round) {
      for (const Given& g : given_) g.run(plain, g.want, stream_);
    }
    stream_.synchronize();
  }
  void run() {
    for (int round = 0; round < kRounds; ++round) {
      for (const Given& g : given_) g.run(kept_, g.out, stream_);
    }
    stream_.synchronize();
    for (const Given& g : given_) {
      EXPECT_TRUE(same_bits(Tensor::copy_of(g.out), Tensor::copy_of(g.want))) << &g - given_.data();
    }
  }
  static constexpr int kRounds = 4, kKinds = 5;

 private:
  struct Given {
    Tensor x, ids, weights, out, want, memory;
    Shape shape;
    bool accumulate = false;
    void run(MoeLayer& layer, const Tensor& to, Stream stream) const {
      const TensorView rows(to.view().data(), to.dtype(), shape, {to.view().strides()[0], 1}, kGpu);
      layer.forward(x, ids, weights, rows, {.accumulate = accumulate, .workspace = memory}, stream);
    }
  };
  static constexpr DType kTypes[] = {DType::bfloat16, DType::float16, DType::float32};
  static Tensor wide(const Tensor& ids) {
    const Tensor out = Tensor::empty(DType::int64, ids.view().shape());
    for (std::int64_t i = 0; i < ids.elems(); ++i) out.as<std::int64_t>()[i] = ids.as<std::int32_t>()[i];
    return out;
  }
  MoeLayer kept_;
  const cuda::OwnedStream stream_;
  std::vector<Given> given_;
};

TEST_F(Replay, EveryKernelTakesOtherTensors) {
  struct Kind {
    const char* scheme;
    std::int64_t tokens;
    KernelFamily family = KernelFamily::automatic;
    bool fused = true, shared = false;
  };
  int clusters = 0;
  for (const Kind& k : {Kind{"int8_channel", 1}, Kind{"int8_channel", 4}, Kind{"int8_channel", 40},
                        Kind{"int8_channel", 40, KernelFamily::sm80}, Kind{"int8_channel:asymmetric", 40},
                        Kind{"int8_channel", 3000}, Kind{"int8_channel", 40, KernelFamily::automatic, false},
                        Kind{"int8_block", 40}, Kind{"int8_hybrid", 40, KernelFamily::automatic, true, true}}) {
    SCOPED_TRACE(std::string(k.scheme) + " T" + std::to_string(k.tokens) + (k.fused ? "" : " unfused") +
                 (k.family == KernelFamily::sm80 ? " sm80" : "") + (k.shared ? " shared" : ""));
    LayerCase c = problem(k.tokens);
    c.scheme = Scheme::parse(k.scheme);
    c.intermediate = 256;
    LayerOptions o;
    o.family = k.family;
    o.fused_gather = o.fused_activation = k.fused;
    if (k.shared) o.shared_expert = make_weights(c, 1);
    OtherTensors calls(c, make_weights(c, 8), o);
    const Launches launches;
    calls.run();
    EXPECT_EQ(Launches::graphs, OtherTensors::kRounds * OtherTensors::kKinds - 2);
    EXPECT_GE(Launches::updates, 2 * (Launches::graphs - 1));
    clusters += Launches::clusters;
  }
  // Their attributes are not arguments: nodes must keep them.
  EXPECT_EQ(clusters > 0, cuda::device_info(0).compute_capability == 90);
}

TEST_F(Replay, MoreKindsThanAreKept) {
  LayerOptions o;
  o.replays = 3;
  MoeLayer layer(kGpu, weights_, o);
  std::vector<Call> calls;
  for (std::uint32_t i = 0; i < 6; ++i) calls.emplace_back(problem(3 + i, 10 + i), weights_);
  const Launches launches;
  for (int i = 0; i < kRepeats; ++i) {  // round and round: each is forgotten before it comes again
    for (Call& c : calls) c.run(layer);
  }
  EXPECT_EQ(Launches::graphs, 0);
  for (const Call& c : calls) EXPECT_TRUE(c.right());
  for (int round = 0; round < 3; ++round) {  // one at a time: graphs are made, and released while they may still run
    for (Call& c : calls) {
      cuda::fill_zero(c.out.view().data(), c.out.bytes(), 0);
      for (int i = 0; i < kRepeats; ++i) c.run(layer);
    }
  }
  EXPECT_GT(Launches::graphs, 0);
  for (const Call& c : calls) EXPECT_TRUE(c.right());
}

TEST_F(Replay, StreamsThreadsAndOneLayer) {
  MoeLayer layer(kGpu, weights_);
  constexpr int kThreads = 4;
  std::vector<Call> calls;
  for (std::uint32_t i = 0; i < kThreads; ++i) calls.emplace_back(problem(40, 20 + i), weights_);
  const cuda::OwnedStream streams[kThreads];
  const Launches launches;
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {  // a thread without a current context
      for (int i = 0; i < 5 * kRepeats; ++i) calls[t].run(layer, streams[t]);
    });
  }
  for (std::thread& t : threads) t.join();
  for (std::size_t t = 0; t < kThreads; ++t) {
    streams[t].synchronize();
    EXPECT_TRUE(calls[t].right()) << t;
  }
  EXPECT_GT(Launches::graphs, kThreads * kRepeats);
}

TEST_F(Replay, TheCallersCaptureInBetween) {
  MoeLayer layer(kGpu, weights_);
  Call call(problem(9), weights_);
  const cuda::OwnedStream stream;
  for (int i = 0; i < kRepeats; ++i) call.run(layer, stream);
  const Launches launches;
  const auto graph = cuda::Graph::capture(stream, [&] { call.run(layer, stream); });
  EXPECT_EQ(graph.nodes(), 6u);
  EXPECT_EQ(Launches::graphs, 0);
  call.fill(31);
  graph.launch(stream);
  stream.synchronize();
  EXPECT_TRUE(call.right());
  call.fill(32);
  call.run(layer, stream);
  stream.synchronize();
  EXPECT_TRUE(call.right());
  EXPECT_EQ(Launches::graphs, 2);
}

// As PyTorch captures: no thread may allocate meanwhile. Graphs that are made and released then do not disturb it.
TEST_F(Replay, WhileAnotherStreamIsCaptured) {
  LayerOptions o;
  o.replays = 1;
  MoeLayer layer(kGpu, weights_, o);
  layer.reserve(9, 2);
  Call call(problem(9), weights_), other(problem(5), weights_);
  const cuda::OwnedStream stream, captured;
  cuda::CuGraph graph = nullptr;
  {
    const Launches launches;
    OCTOMOE_CUDA(cuStreamBeginCapture, captured.get(), cuda::kCaptureGlobal);
    for (int i = 0; i < kRepeats; ++i) call.run(layer, stream);
    std::thread([&] {
      for (int i = 0; i < kRepeats; ++i) other.run(layer, stream);  // in the place of the first graph
    }).join();
    for (int i = 0; i < kRepeats; ++i) call.run(layer, stream);
    EXPECT_GT(Launches::graphs, 2 * kRepeats);
  }
  OCTOMOE_CUDA(cuStreamEndCapture, captured.get(), &graph);
  cuda::driver().cuGraphDestroy(graph);
  stream.synchronize();
  EXPECT_TRUE(call.right() && other.right());
}

TEST_F(Replay, ReserveMovesTheWorkspace) {
  MoeLayer layer(kGpu, weights_);
  Call call(problem(9), weights_);
  for (const std::int64_t tokens : {9, 90, 9000}) {
    layer.reserve(tokens, 2);
    cuda::fill_zero(call.out.view().data(), call.out.bytes(), 0);
    for (int i = 0; i < kRepeats; ++i) call.run(layer);
    EXPECT_TRUE(call.right()) << tokens;
  }
}

// Nobody has waited for the graphs when their layer goes.
TEST_F(Replay, LayersEndWhileTheirGraphsRun) {
  Call call(problem(300), weights_);
  const cuda::OwnedStream stream;
  for (int round = 0; round < 4; ++round) {
    auto layer = std::make_unique<MoeLayer>(kGpu, weights_);
    for (int i = 0; i < kRepeats; ++i) call.run(*layer, stream);
    if (round % 2 == 0)
      layer.reset();
    else
      std::thread([&] { layer.reset(); }).join();  // in a thread without a current context
    stream.synchronize();
    ASSERT_TRUE(call.right()) << round;
    cuda::fill_zero(call.out.view().data(), call.out.bytes(), 0);
  }
}

}  // namespace
}  // namespace octomoe::testing
