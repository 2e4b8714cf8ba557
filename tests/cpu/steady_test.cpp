// What a server relies on: no allocation once reserved, memory as promised, a caller's float modes without influence.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/target.h"
#include "support/run.h"

#if OCTOMOE_X86
#include <immintrin.h>
#endif

namespace {
std::atomic<bool> counting{false};
std::atomic<int> allocations{0};
void* counted(std::size_t bytes) {
  if (counting.load()) ++allocations;
  if (void* p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
}  // namespace

// noinline: GCC 12 at -O1 inlines delete alone, then takes free() for the wrong partner of new.
#define OCTOMOE_REPLACED __attribute__((noinline))
OCTOMOE_REPLACED void* operator new(std::size_t bytes) { return counted(bytes); }
OCTOMOE_REPLACED void* operator new[](std::size_t bytes) { return counted(bytes); }
OCTOMOE_REPLACED void operator delete(void* p) noexcept { std::free(p); }
OCTOMOE_REPLACED void operator delete[](void* p) noexcept { std::free(p); }
OCTOMOE_REPLACED void operator delete(void* p, std::size_t) noexcept { std::free(p); }
OCTOMOE_REPLACED void operator delete[](void* p, std::size_t) noexcept { std::free(p); }

namespace octomoe::testing {
namespace {

TEST(CpuSteady, ForwardDoesNotAllocate) {
  for (const char* scheme : {"int8_channel", "int8_block", "int8_hybrid", "w4a8_fp8:static", "bf16", "fp16"}) {
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    const MoeWeights w = make_weights(c, c.experts);
    LayerOptions o;
    LayerCase shared = c;
    shared.experts = 1;
    o.shared_expert = make_weights(shared, 1);
    o.threads = 3;
    const LayerInput in = make_input(c);
    Tensor out = Tensor::empty(DType::bfloat16, {c.tokens, c.hidden});
    MoeLayer layer(Device::cpu(), w, o);
    layer.reserve(64, c.top_k);
    allocations = 0;  // the process's first forward counts too: ctest runs this test alone
    counting = true;
    layer.forward(in.x, in.ids, in.weights, out);
    counting = false;
    EXPECT_EQ(allocations.load(), 0) << scheme;
  }
}

// The biggest arrays alive together (docs/cpu.md), plus what threads and the sort need.
TEST(CpuSteady, WorkspaceIsWhatIsAlive) {
  LayerCase c;
  c.hidden = 512;
  c.intermediate = 192;
  c.experts = 4;
  LayerOptions o;
  o.threads = 1;
  const MoeLayer layer(Device::cpu(), make_weights(c, c.experts), o);
  const double rows = 4096.0 * 3, h8 = rows * (192 + 4), y = rows * 512 * 2;
  const double bytes = static_cast<double>(layer.workspace_bytes(4096, 3));
  EXPECT_GE(bytes, h8 + y);
  EXPECT_LE(bytes, 1.2 * (h8 + y));
  EXPECT_GT(layer.workspace_bytes(8, 3), 0u);
  EXPECT_LE(layer.workspace_bytes(1, 3), std::size_t{64} << 10);
}

#if OCTOMOE_X86
TEST(CpuSteady, FlushToZeroOfTheCallerChangesNothing) {
  LayerCase c;
  c.tokens = 6;
  const MoeWeights w = make_weights(c, c.experts);
  LayerInput in = make_input(c, DType::float32);
  for (std::int64_t i = 0; i < in.x.elems(); ++i) in.x.as<float>()[i] *= 0x1p-118f;  // products far below 2^-126
  for (const int threads : {1, 2}) {
    LayerOptions o;
    o.threads = threads;
    const Tensor want = run_layer(Device::cpu(), w, o, in, DType::float32);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x8040 | 0x2000);  // FTZ, DAZ, round down
    MoeLayer layer(Device::cpu(), w, o);
    Tensor got = Tensor::empty(DType::float32, {c.tokens, c.hidden});
    layer.forward(in.x, in.ids, in.weights, got);
    EXPECT_EQ(_mm_getcsr() & ~0x3fu, 0x1f80u | 0x8040u | 0x2000u);
    _mm_setcsr(before);
    EXPECT_TRUE(same_bits(want, got));
  }
}
#endif

}  // namespace
}  // namespace octomoe::testing
