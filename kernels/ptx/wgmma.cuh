// wgmma.mma_async on signed bytes: 64 weight rows by N tokens by 32, both operands in shared memory, int32 sums in
// registers. A thread's sum d[4j + 2h + e] belongs to row 16 * warp + 8h + lane / 4 and column 8j + 2 * (lane % 4) + e.
#pragma once

#include "core/types.h"

namespace octomoe::ptx {

// Before the first of a group of wgmma: registers and shared memory that they read are as the program says.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler may not read sums before the wait that it stands behind.
template <int kN>
__device__ __forceinline__ void wgmma_results(int32_t (&d)[kN]) {
  static_assert(kN % 8 == 0);
#pragma unroll
  for (int i = 0; i < kN; i += 8) {
    asm volatile(""
                 : "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]),
                   "+r"(d[i + 6]), "+r"(d[i + 7])::"memory");
  }
}

// A matrix in shared memory: rows of 128 bytes along K, swizzled by 128, from an address that is a multiple of 1024.
// Steps of 32 columns add 2.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 16) | ((shared & 0x3ffffu) >> 4);
}

// d = a * b over 128 columns of K, plus d where `accumulate`. Four instructions in one statement: with one each, their
// operands are most of what a kernel's compilation takes.
template <int kTokens>
struct Wgmma;

// clang-format off
#define OCTOMOE_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define OCTOMOE_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define OCTOMOE_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define OCTOMOE_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define OCTOMOE_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define OCTOMOE_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define OCTOMOE_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define OCTOMOE_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define OCTOMOE_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define OCTOMOE_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define OCTOMOE_D(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define OCTOMOE_STEP(kTokens, kRegisters, a, b, p) \
  "wgmma.mma_async.sync.aligned.m64n" #kTokens "k32.s32.s8.s8 {" kRegisters "}, " a ", " b ", " p ";\n"
#define OCTOMOE_WGMMA(kTokens, kRegisters, a_index, b_index, p_index, ...)                             \
  template <>                                                                                        \
  struct Wgmma<kTokens> {                                                                            \
    template <int kSize>                                                                             \
    static __device__ __forceinline__ void mma(int32_t (&d)[kSize], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p, always;\n.reg .b64 a1, a2, a3, b1, b2, b3;\n"                    \
                   "setp.ne.b32 p, " p_index ", 0;\nsetp.eq.b32 always, 0, 0;\n"                     \
                   "add.s64 a1, " a_index ", 2;\nadd.s64 a2, " a_index ", 4;\nadd.s64 a3, " a_index ", 6;\n" \
                   "add.s64 b1, " b_index ", 2;\nadd.s64 b2, " b_index ", 4;\nadd.s64 b3, " b_index ", 6;\n" \
                   OCTOMOE_STEP(kTokens, kRegisters, a_index, b_index, "p")                           \
                   OCTOMOE_STEP(kTokens, kRegisters, "a1", "b1", "always")                            \
                   OCTOMOE_STEP(kTokens, kRegisters, "a2", "b2", "always")                            \
                   OCTOMOE_STEP(kTokens, kRegisters, "a3", "b3", "always") "}"                        \
                   : __VA_ARGS__                                                                     \
                   : "l"(a), "l"(b), "r"(accumulate));                                               \
    }                                                                                                \
  };
OCTOMOE_WGMMA(16, OCTOMOE_R0, "%8", "%9", "%10", OCTOMOE_D(0))
OCTOMOE_WGMMA(32, OCTOMOE_R0 ", " OCTOMOE_R1, "%16", "%17", "%18", OCTOMOE_D(0), OCTOMOE_D(8))
OCTOMOE_WGMMA(48, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2, "%24", "%25", "%26", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16))
OCTOMOE_WGMMA(64, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2 ", " OCTOMOE_R3, "%32", "%33", "%34", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16), OCTOMOE_D(24))
OCTOMOE_WGMMA(80, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2 ", " OCTOMOE_R3 ", " OCTOMOE_R4, "%40", "%41", "%42", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16), OCTOMOE_D(24), OCTOMOE_D(32))
OCTOMOE_WGMMA(96, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2 ", " OCTOMOE_R3 ", " OCTOMOE_R4 ", " OCTOMOE_R5, "%48", "%49", "%50", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16), OCTOMOE_D(24), OCTOMOE_D(32), OCTOMOE_D(40))
OCTOMOE_WGMMA(112, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2 ", " OCTOMOE_R3 ", " OCTOMOE_R4 ", " OCTOMOE_R5 ", " OCTOMOE_R6, "%56", "%57", "%58", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16), OCTOMOE_D(24), OCTOMOE_D(32), OCTOMOE_D(40), OCTOMOE_D(48))
OCTOMOE_WGMMA(128, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2 ", " OCTOMOE_R3 ", " OCTOMOE_R4 ", " OCTOMOE_R5 ", " OCTOMOE_R6 ", " OCTOMOE_R7, "%64", "%65", "%66", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16), OCTOMOE_D(24), OCTOMOE_D(32), OCTOMOE_D(40), OCTOMOE_D(48), OCTOMOE_D(56))
OCTOMOE_WGMMA(144, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2 ", " OCTOMOE_R3 ", " OCTOMOE_R4 ", " OCTOMOE_R5 ", " OCTOMOE_R6 ", " OCTOMOE_R7 ", " OCTOMOE_R8, "%72", "%73", "%74", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16), OCTOMOE_D(24), OCTOMOE_D(32), OCTOMOE_D(40), OCTOMOE_D(48), OCTOMOE_D(56), OCTOMOE_D(64))
OCTOMOE_WGMMA(160, OCTOMOE_R0 ", " OCTOMOE_R1 ", " OCTOMOE_R2 ", " OCTOMOE_R3 ", " OCTOMOE_R4 ", " OCTOMOE_R5 ", " OCTOMOE_R6 ", " OCTOMOE_R7 ", " OCTOMOE_R8 ", " OCTOMOE_R9, "%80", "%81", "%82", OCTOMOE_D(0), OCTOMOE_D(8), OCTOMOE_D(16), OCTOMOE_D(24), OCTOMOE_D(32), OCTOMOE_D(40), OCTOMOE_D(48), OCTOMOE_D(56), OCTOMOE_D(64), OCTOMOE_D(72))
#undef OCTOMOE_R0
#undef OCTOMOE_R1
#undef OCTOMOE_R2
#undef OCTOMOE_R3
#undef OCTOMOE_R4
#undef OCTOMOE_R5
#undef OCTOMOE_R6
#undef OCTOMOE_R7
#undef OCTOMOE_R8
#undef OCTOMOE_R9
#undef OCTOMOE_D
#undef OCTOMOE_STEP
#undef OCTOMOE_WGMMA
// clang-format on

}  // namespace octomoe::ptx
