// One instruction a wrapper: what SM80 brought.
#pragma once

#include "core/types.h"

namespace octomoe::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes global -> shared; with `valid` false, 16 zero bytes and nothing is read.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
// The same where `issue` holds, by predicate, not branch: the compiler may move other work past it.
__device__ __forceinline__ void cp_async_16_if(bool issue, uint32_t shared, const void* global, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p cp.async.cg.shared.global [%0], [%1], 16, %2;\n}" ::"r"(shared),
      "l"(global), "r"(valid ? 16 : 0), "r"(static_cast<int>(issue))
      : "memory");
}
__device__ __forceinline__ void cp_async_4_if(bool issue, uint32_t shared, const void* global) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p cp.async.ca.shared.global [%0], [%1], 4;\n}" ::"r"(shared),
               "l"(global), "r"(static_cast<int>(issue))
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A word that another kernel may be writing: whatever it is at the time, of L2.
__device__ __forceinline__ int32_t load_relaxed(const int32_t* global) {
  int32_t d;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(d) : "l"(global) : "memory");
  return d;
}

// Where `wanted` holds, by predicate: the 128 bytes at `line`, aligned to as many, are worth nothing from now on, so
// that L2 need not write them to memory. Reads of other threads must have happened before.
__device__ __forceinline__ void discard_line(bool wanted, const void* line) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p discard.global.L2 [%0], 128;\n}" ::"l"(line),
               "r"(static_cast<int>(wanted))
               : "memory");
}

__device__ __forceinline__ int32_t load_shared(uint32_t shared) {
  int32_t d;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(d) : "r"(shared) : "memory");
  return d;
}
__device__ __forceinline__ int32_t load_shared_byte(uint32_t shared) {
  int32_t d;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(d) : "r"(shared) : "memory");
  return d;
}
__device__ __forceinline__ int2 load_shared_2(uint32_t shared) {
  int2 d;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(shared) : "memory");
  return d;
}
// kN neighbouring words.
template <int kN>
__device__ __forceinline__ void load_shared_n(int32_t (&d)[kN], uint32_t shared) {
  static_assert(kN == 1 || kN == 2 || kN % 4 == 0);
  if constexpr (kN == 1) {
    d[0] = load_shared(shared);
  } else if constexpr (kN == 2) {
    const int2 x = load_shared_2(shared);
    d[0] = x.x;
    d[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(d[i]), "=r"(d[i + 1]), "=r"(d[i + 2]), "=r"(d[i + 3])
                   : "r"(shared + i * 4)
                   : "memory");
    }
  }
}
// Neighbouring words, aligned to their size, to global memory; where `wanted` holds, by predicate. As a C++ vector
// store the compiler may split it.
template <int kN>
__device__ __forceinline__ void store_if(bool wanted, void* global, const uint32_t (&v)[kN]) {
  static_assert(kN == 1 || kN == 2 || kN == 4);
  if constexpr (kN == 1) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.global.b32 [%0], %1;\n}" ::"l"(global), "r"(v[0]),
                 "r"(static_cast<int>(wanted))
                 : "memory");
  } else if constexpr (kN == 2) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(global),
                 "r"(v[0]), "r"(v[1]), "r"(static_cast<int>(wanted))
                 : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(global),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(static_cast<int>(wanted))
        : "memory");
  }
}
// The value, which the compiler takes for a new one: what is made of it is made here, and does not occupy registers
// from before a loop on.
__device__ __forceinline__ int32_t here(int32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ uint64_t here(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
// A value that all lanes hold, known to the compiler as such: it may live in uniform registers.
__device__ __forceinline__ int32_t uniform(int32_t value) { return __reduce_max_sync(0xffffffffu, value); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
// Arrives when all copies that the thread has started so far have landed.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t& r0, uint32_t& r1, uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(shared)
               : "memory");
}

// d += a * b, int8 16x32 times 32x8, int32 sums that wrap.
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a * b + c in every element.
__device__ __forceinline__ void mma_s8_from(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                            int32_t c) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, "
      "%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
}

}  // namespace octomoe::ptx
