// A GPU in software, for tests: runs a kernel of kernels/**/*.cuh, compiled by the host compiler, with all its threads.
// kernels.h says how kernels come here; include/ptx/ stands for kernels/ptx/.
//
// A CUDA thread is a fiber with a stack of its own; one runs at a time, until it waits. One CTA runs at a time, or the
// two of a cluster, each on an operating system thread whose thread-local storage is the CTA's shared memory.
//
// What it shows: wrong results; reads of shared memory that nobody has written (dynamic shared memory starts as
// garbage) and writes behind it; deadlocks, with where each thread waits; arrivals that an mbarrier does not expect;
// lanes of a warp at different collectives; what a copy, a descriptor or an address must be aligned to. Copies and
// wgmma are as late or as early as a schedule says, and the order of threads is drawn, so a missing wait, barrier or
// __syncwarp and a stage that is released too early give wrong results: late copies land when no thread can go on, late
// products are computed at the wait for them, after everyone else has run. wgmma reads shared memory through an image
// of its own, into which what cp.async wrote comes only by fence.proxy.async (of any thread).
//
// What it does not: memory that hardware orders more weakly than one thread after another (a missing fence between
// plain loads and stores), fence.mbarrier_init and wgmma.fence, kernels that overlap (of dependent launch only
// Launch::predecessor), bank conflicts, registers, time, what ptxas makes of the code, and whether an instruction is as
// include/ptx/ believes: the tests in tests/gpu and tests/python run on a GPU. Static shared memory keeps what the CTA
// before left there.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>

#include "core/tensor_map.h"

namespace octomoe::emulator {

// What a kernel did wrong: a deadlock (and where each thread waits), an address outside of shared memory, lanes of a
// warp at different instructions, ...
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Schedule {
  bool late_copies = true, late_products = true;
  std::uint32_t seed = 0;  // of the order of threads; 0: as they are numbered; odd: warps run as far as they get
};

struct Launch {
  int grid = 1, threads = 32, shared_bytes = 0, cluster = 1;
  Schedule schedule{};
  // What a launch that may still run has written by now, as a CTA sees it: as it begins, and when it first waits.
  std::function<void(bool waited)> predecessor{};
};
void launch(const Launch& launch, const std::function<void()>& kernel);

// What cuTensorMapEncodeTiled makes, for bytes in 5 dimensions with the swizzle of 128 bytes.
kernels::TensorMap encode_tensor_map(const void* base, const std::uint64_t (&sizes)[5],
                                     const std::uint64_t (&strides)[4], const std::uint32_t (&box)[5]);

// ---- for include/ ----
inline constexpr int kMaxSharedBytes = 227 * 1024;

struct LaneValues {
  std::uint32_t v[6];
};
// What all lanes of the warp brought to the same instruction.
const LaneValues* exchange(const char* instruction, std::uint32_t mask, const LaneValues& mine);
int lane();

void grid_dependency_wait();

void cta_barrier(int id, int threads);  // threads 0: all
void cluster_barrier();
std::uint32_t cluster_rank();
std::int32_t load_remote(std::uint32_t shared, std::uint32_t rank);
void send_word(std::uint32_t to, std::uint32_t barrier, std::uint32_t rank, std::int32_t word);

std::uint32_t shared_address(const void* p);
std::uint8_t* shared_bytes(std::uint32_t address, std::uint32_t bytes);

void barrier_init(std::uint32_t barrier, int count);
void barrier_arrive(std::uint32_t barrier, std::uint32_t expected_bytes = 0);
void barrier_expect(std::uint32_t barrier, std::uint32_t bytes);
void barrier_arrive_at(std::uint32_t barrier, std::uint32_t rank);
void barrier_wait(std::uint32_t barrier, std::uint32_t parity);

void cp_async(std::uint32_t shared, const void* global, std::uint32_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(std::uint32_t pending);
void cp_async_arrive(std::uint32_t barrier);

void copy_bulk(std::uint32_t shared, const void* global, std::uint32_t bytes, std::uint32_t barrier);
void copy_box(std::uint32_t shared, const kernels::TensorMap* map, const std::int32_t (&at)[5], std::uint32_t barrier,
              std::uint32_t cta_mask);
void fence_proxy_async();

void wgmma(std::int32_t* sums, int tokens, std::uint64_t a, std::uint64_t b, bool accumulate);
void wgmma_commit();
void wgmma_wait(std::uint32_t pending);

}  // namespace octomoe::emulator
