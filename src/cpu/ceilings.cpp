#include "cpu/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/target.h"

#if OCTOMOE_X86
#include <immintrin.h>
#endif

namespace octomoe::cpu {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point t0) { return std::chrono::duration<double>(Clock::now() - t0).count(); }

// Every loop returns the multiply-adds that it did. The instructions are written out: a compiler would spill
// accumulators that it can prove to be equal.
constexpr std::int64_t kRounds = 20'000'000;

std::int64_t peak_portable() {
  std::int32_t acc[64] = {};
  std::int16_t a[64], b[64];
  for (int i = 0; i < 64; ++i) a[i] = static_cast<std::int16_t>(i), b[i] = static_cast<std::int16_t>(i + 1);
  for (std::int64_t r = 0; r < kRounds / 4; ++r) {
    for (int i = 0; i < 64; ++i) acc[i] += static_cast<std::int32_t>(a[i]) * b[i];
    asm volatile("" : : "r"(acc), "r"(a), "r"(b) : "memory");
  }
  return kRounds / 4 * 64;
}

#if OCTOMOE_X86
OCTOMOE_TARGET_BEGIN("avx2")
std::int64_t peak_avx2() {
  for (std::int64_t r = 0; r < kRounds; ++r) {
#define STEP(i) "vpmaddwd %%ymm14, %%ymm15, %%ymm13\n vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
    asm volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
                 :
                 :
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                   "xmm13", "xmm14", "xmm15");
#undef STEP
  }
  return kRounds * 12 * 16;
}
OCTOMOE_TARGET_END

OCTOMOE_TARGET_BEGIN("avx512f,avx512vl,avx512bw,avx512vnni")
std::int64_t peak_vnni() {
  for (std::int64_t r = 0; r < kRounds; ++r) {
#define STEP(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
    asm volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
                 :
                 :
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                   "xmm30", "xmm31");
#undef STEP
  }
  return kRounds * 12 * 64;
}
OCTOMOE_TARGET_END

OCTOMOE_TARGET_BEGIN("avx512f,amx-tile,amx-int8")
std::int64_t peak_amx() {
  alignas(64) std::uint8_t config[64] = {1};
  for (int t = 0; t < 8; ++t) {
    config[16 + 2 * t] = 64;
    config[48 + t] = 16;
  }
  asm volatile("" : : "r"(config) : "memory");  // GCC's intrinsic reads 8 of the 64 bytes in the compiler's eyes
  _tile_loadconfig(config);
  constexpr std::int64_t kTileRounds = kRounds / 8;
  for (std::int64_t r = 0; r < kTileRounds; ++r) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return kTileRounds * 4 * 16 * 16 * 64;
}
OCTOMOE_TARGET_END
#endif

using Peak = std::int64_t (*)();
Peak peak_of(Isa isa) {
#if OCTOMOE_X86
  switch (isa) {
    case Isa::portable:
      break;
    case Isa::avx2:
      return peak_avx2;
    case Isa::vnni:
      return peak_vnni;
    case Isa::amx:
      return peak_amx;
  }
#else
  (void)isa;
#endif
  return peak_portable;
}

// The kernels' own pattern: two streams of 32 KB, the next 64 KB fetched meanwhile into the second-level cache. One
// stream with a short distance gives less: 13 instead of 19 GB/s a core on an Emerald Rapids host.
std::uint64_t read_all(const std::uint64_t* p, std::int64_t words) {
  constexpr std::int64_t kLine = 8, kStream = 32 * 1024 / 8;
  std::uint64_t s[kLine] = {};
  for (; words >= 2 * kStream; words -= 2 * kStream, p += 2 * kStream) {
    for (std::int64_t i = 0; i < kStream; i += kLine) {
      __builtin_prefetch(p + 2 * kStream + 2 * i, 0, 2);
      __builtin_prefetch(p + 2 * kStream + 2 * i + kLine, 0, 2);
      for (std::int64_t w = 0; w < kLine; ++w) s[w] ^= p[i + w] + p[kStream + i + w];
    }
  }
  return s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
}

}  // namespace

double measure_read_bandwidth(int threads) {
  ThreadPool pool(threads);
  const int n = pool.threads();
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  HugeBuffer buffer(kBytes);
  const std::size_t part = kBytes / static_cast<std::size_t>(n) / 64 * 64;
  pool.parallel_for(n, [&](std::int64_t i, int) {
    std::memset(static_cast<char*>(buffer.data()) + static_cast<std::size_t>(i) * part, 1, part);
  });
  std::vector<std::uint64_t> sink(static_cast<std::size_t>(n) * 8);
  double best = 0.0;
  for (int round = 0; round < 5; ++round) {
    const auto t0 = Clock::now();
    pool.parallel_for(n, [&](std::int64_t i, int) {
      const auto* p = static_cast<const std::uint64_t*>(buffer.data()) + static_cast<std::size_t>(i) * part / 8;
      sink[static_cast<std::size_t>(i) * 8] = read_all(p, static_cast<std::int64_t>(part / 8));
    });
    best = std::max(best, static_cast<double>(part) * n / seconds_since(t0));
  }
  asm volatile("" : : "r"(sink.data()) : "memory");
  return best;
}

double measure_int8_peak(int threads) {
  ThreadPool pool(threads);
  const int n = pool.threads();
  const Peak peak = peak_of(best_isa());
  std::vector<std::int64_t> done(static_cast<std::size_t>(n) * 8);
  double best = 0.0;
  for (int round = 0; round < 3; ++round) {
    const auto t0 = Clock::now();
    pool.parallel_for(n, [&](std::int64_t i, int) { done[static_cast<std::size_t>(i) * 8] = peak(); });
    const double s = seconds_since(t0);
    double total = 0.0;
    for (int i = 0; i < n; ++i) total += static_cast<double>(done[static_cast<std::size_t>(i) * 8]);
    best = std::max(best, 2.0 * total / s);
  }
  return best;
}

}  // namespace octomoe::cpu
