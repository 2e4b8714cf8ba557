// One instruction a wrapper: what SM90 brought beside wgmma (ptx/wgmma.cuh) and dependent launch (ptx/grid.cuh).
#pragma once

#include "core/cache_hint.h"
#include "core/tensor_map.h"
#include "ptx/sm80.cuh"

namespace octomoe::ptx {

// Arrives, and tells the barrier how many bytes of bulk copies to wait for.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// Bytes of bulk copies to wait for, beyond those that arrivals tell of.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Initialised barriers become visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Bytes that threads wrote to shared memory become visible to wgmma and the copy engine.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_tensor_map(const kernels::TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// `bytes` (a multiple of 16) of global memory -> shared, both aligned to 16; they complete at `barrier`.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                                          uint64_t hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(hint)
      : "memory");
}

// `bytes` (a multiple of 16) of global memory -> L2.
__device__ __forceinline__ void prefetch_bulk(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
// 16 bytes that are read once, kept neither in L1 nor longer than need be in L2; `to` stays where `wanted` does not
// hold.
__device__ __forceinline__ void load_once(int4& to, const void* from, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, "
      "%3}, "
      "[%4], %6;\n}"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(from), "r"(static_cast<int>(wanted)), "l"(kernels::kEvictFirst));
}

// store_if (ptx/sm80.cuh) with a hint for L2.
template <int kN>
__device__ __forceinline__ void store_if(bool wanted, void* global, const uint32_t (&v)[kN], uint64_t hint) {
  static_assert(kN == 1 || kN == 2 || kN == 4);
  if constexpr (kN == 1) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.global.L2::cache_hint.b32 [%0], %1, %3;\n}" ::"l"(global),
        "r"(v[0]), "r"(static_cast<int>(wanted)), "l"(hint)
        : "memory");
  } else if constexpr (kN == 2) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %4;\n}" ::"l"(
            global),
        "r"(v[0]), "r"(v[1]), "r"(static_cast<int>(wanted)), "l"(hint)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, "
        "%6;\n}" ::"l"(global),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(static_cast<int>(wanted)), "l"(hint)
        : "memory");
  }
}

// Where `wanted` holds, by predicate: bf16 pairs are added to those at `global`, aligned to their size in all, by L2,
// in whatever order; each addition rounds to nearest even.
template <int kN>
__device__ __forceinline__ void add_bf16_if(bool wanted, void* global, const uint32_t (&v)[kN], uint64_t hint) {
  static_assert(kN == 2 || kN == 4);
  if constexpr (kN == 2) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n"
        "@p red.relaxed.gpu.global.add.noftz.L2::cache_hint.v2.bf16x2 [%0], {%1, %2}, %4;\n}" ::"l"(global),
        "r"(v[0]), "r"(v[1]), "r"(static_cast<int>(wanted)), "l"(hint)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "@p red.relaxed.gpu.global.add.noftz.L2::cache_hint.v4.bf16x2 [%0], {%1, %2, %3, %4}, %6;\n}" ::"l"(global),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(static_cast<int>(wanted)), "l"(hint)
        : "memory");
  }
}
// The same of fp16 pairs.
template <int kN>
__device__ __forceinline__ void add_fp16_if(bool wanted, void* global, const uint32_t (&v)[kN], uint64_t hint) {
  static_assert(kN == 2 || kN == 4);
  if constexpr (kN == 2) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n"
        "@p red.relaxed.gpu.global.add.noftz.L2::cache_hint.v2.f16x2 [%0], {%1, %2}, %4;\n}" ::"l"(global),
        "r"(v[0]), "r"(v[1]), "r"(static_cast<int>(wanted)), "l"(hint)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "@p red.relaxed.gpu.global.add.noftz.L2::cache_hint.v4.f16x2 [%0], {%1, %2, %3, %4}, %6;\n}" ::"l"(global),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(static_cast<int>(wanted)), "l"(hint)
        : "memory");
  }
}

// A box of a 5-D tensor -> shared; its bytes complete at `barrier`. Bytes outside the tensor arrive as zeros.
__device__ __forceinline__ void copy_box_5d(uint32_t shared, const kernels::TensorMap* map, int32_t c0, int32_t c1,
                                            int32_t c2, int32_t c3, int32_t c4, uint32_t barrier, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, "
      "%4, %5, %6}], [%7], %8;" ::"r"(shared),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "l"(hint)
      : "memory");
}

// The same into the same place of all CTAs of the cluster in `mask`, each with its own barrier.
__device__ __forceinline__ void copy_box_5d_multicast(uint32_t shared, const kernels::TensorMap* map, int32_t c0,
                                                      int32_t c1, int32_t c2, int32_t c3, int32_t c4, uint32_t barrier,
                                                      uint64_t hint, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;" ::"r"(shared),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "h"(mask), "l"(hint)
      : "memory");
}

// A box of a matrix -> shared, likewise.
__device__ __forceinline__ void copy_box_2d(uint32_t shared, const kernels::TensorMap* map, int32_t column, int32_t row,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// Arrives at the barrier that lies at `barrier` in another CTA of the cluster. Without .release.cluster, which would
// order all of the thread's memory accesses before it, GPU-wide.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, "
      "[remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// The word that lies at `shared` in another CTA of the cluster.
__device__ __forceinline__ int32_t load_remote(uint32_t shared, uint32_t rank) {
  int32_t d;
  asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.b32 %0, [remote];\n}"
               : "=r"(d)
               : "r"(shared), "r"(rank)
               : "memory");
  return d;
}
// A word -> the place `to` of CTA `rank` of the cluster, and an arrival at its `barrier`, whose phase ends when both
// are there.
__device__ __forceinline__ void send_word(uint32_t to, uint32_t barrier, uint32_t rank, int32_t word) {
  asm volatile(
      "{\n.reg .b32 there, at;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 at, %1, %2;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [at], 4;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [there], %3, [at];\n}" ::"r"(to),
      "r"(barrier), "r"(rank), "r"(word)
      : "memory");
}
// All threads of all CTAs of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

// Of both 16-bit halves.
__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

}  // namespace octomoe::ptx
