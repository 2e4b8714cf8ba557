// The emulator itself: what it must say, it says.
#include "emulator/machine.h"

#include <gmock/gmock.h>

#include <array>
#include <cstring>

#include "emulator/cuda.h"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace octomoe::emulator {
namespace {

using ::testing::HasSubstr;

std::string fault_of(const Launch& with, const std::function<void()>& kernel) {
  try {
    launch(with, kernel);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "no fault";
}
std::uint8_t* memory() {
  ptx::shared_address(sm90::memory);
  return sm90::memory;
}

TEST(Machine, DeadlockSaysWhereEachThreadWaits) {
  const std::string text = fault_of({.threads = 64, .shared_bytes = 64}, [] {
    if (threadIdx.x == 40) {
      const std::uint32_t barrier = ptx::shared_address(memory());
      ptx::barrier_init(barrier, 1);
      ptx::barrier_wait(barrier, 0);
    }
    __syncthreads();
  });
  EXPECT_THAT(text, HasSubstr("deadlock"));
  EXPECT_THAT(text, HasSubstr("at barrier 0: 63 threads from 0"));
  EXPECT_THAT(text, HasSubstr("at mbarrier 0: 1 threads from 40"));
}

TEST(Machine, Faults) {
  const Launch with{.shared_bytes = 64};
  EXPECT_THAT(fault_of(with, [] { ptx::load_shared(ptx::shared_address(memory() + 64)); }), HasSubstr("has 64 bytes"));
  EXPECT_THAT(fault_of(with, [] { ptx::load_shared(ptx::shared_address(memory() + 2)); }), HasSubstr("not aligned"));
  EXPECT_THAT(fault_of(with, [] { memory()[70] = 1; }), HasSubstr("written behind shared memory, byte 6"));
  EXPECT_THAT(fault_of(with, [] { ptx::barrier_arrive(ptx::shared_address(memory())); }),
              HasSubstr("no mbarrier at 0"));
  EXPECT_THAT(fault_of(with,
                       [] {
                         if (threadIdx.x < 16) {
                           __syncwarp();
                         } else {
                           __ballot_sync(~0u, true);
                         }
                       }),
              HasSubstr("__syncwarp and __ballot_sync"));
  EXPECT_THAT(fault_of(with,
                       [] {
                         const std::uint32_t barrier = ptx::shared_address(memory());
                         if (threadIdx.x == 0) ptx::barrier_init(barrier, 31);
                         __syncwarp();
                         ptx::barrier_arrive(barrier);
                         if (threadIdx.x == 0) ptx::barrier_arrive(barrier);
                         __syncwarp();
                       }),
              "no fault");  // 33 arrivals: a phase, and the beginning of the next
}

// Late copies are not there before the wait for them, early ones at once.
TEST(Machine, CopiesAreAsLateAsTheScheduleSays) {
  alignas(16) const std::array<std::uint8_t, 16> from{1, 2, 3};
  for (const bool late : {false, true}) {
    int before = 0, after = 0;
    launch({.shared_bytes = 16, .schedule = {.late_copies = late}}, [&] {
      if (threadIdx.x != 0) return;
      ptx::cp_async_16(ptx::shared_address(memory()), from.data(), true);
      ptx::cp_async_commit();
      before = memory()[1];
      ptx::cp_async_wait<0>();
      after = memory()[1];
    });
    EXPECT_EQ(before, late ? 0xd5 : 2);
    EXPECT_EQ(after, 2);
  }
}

// 64 rows of 1 times 16 rows of 2, of which cp.async wrote the latter.
TEST(Machine, WgmmaNeedsTheWaitAndTheFence) {
  alignas(16) std::array<std::uint8_t, 64 * 128> ones;
  alignas(16) std::array<std::uint8_t, 16> twos;
  ones.fill(1);
  twos.fill(2);
  for (const bool fence : {false, true}) {
    std::array<std::int32_t, 8> early{}, sums{};
    launch({.threads = 128, .shared_bytes = 80 * 128 + 8}, [&] {
      const std::uint32_t at = ptx::shared_address(memory()), barrier = at + 80 * 128;
      if (threadIdx.x == 0) {
        ptx::barrier_init(barrier, 129);
        ptx::barrier_arrive_expect(barrier, 64 * 128);
        ptx::copy_bulk(at, ones.data(), 64 * 128, barrier, 0);
      }
      __syncthreads();
      ptx::cp_async_16(at + 64 * 128 + threadIdx.x * 16, twos.data(), true);
      ptx::cp_async_arrive(barrier);
      ptx::barrier_wait(barrier, 0);
      if (fence) ptx::fence_proxy_async();
      std::int32_t d[8];
      ptx::Wgmma<16>::mma(d, ptx::matrix_descriptor(at), ptx::matrix_descriptor(at + 64 * 128), 0);
      ptx::wgmma_commit();
      if (threadIdx.x == 77) std::copy_n(d, 8, early.begin());
      ptx::wgmma_wait<0>();
      if (threadIdx.x == 77) std::copy_n(d, 8, sums.begin());
    });
    EXPECT_THAT(early, ::testing::Each(::testing::Ne(256)));
    EXPECT_THAT(sums, ::testing::Each(fence ? 256 : 128 * static_cast<std::int8_t>(0xd5)));
  }
}

}  // namespace
}  // namespace octomoe::emulator
