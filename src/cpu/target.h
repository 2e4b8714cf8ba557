// OCTOMOE_TARGET_BEGIN("avx2,fma") ... OCTOMOE_TARGET_END: functions between them are compiled for these instruction
// sets, lambdas and templates included. Include every header before: an inline function of a header compiled for
// AVX-512 could be the copy that the linker keeps for the whole program.
#pragma once

#if defined(__x86_64__) && !defined(OCTOMOE_NO_X86)
#define OCTOMOE_X86 1
#else
#define OCTOMOE_X86 0
#endif

#define OCTOMOE_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define OCTOMOE_UNROLL _Pragma("unroll")
#define OCTOMOE_TARGET_BEGIN(isa) \
  OCTOMOE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define OCTOMOE_TARGET_END OCTOMOE_PRAGMA(clang attribute pop)
#else
#define OCTOMOE_UNROLL _Pragma("GCC unroll 32")
#define OCTOMOE_TARGET_BEGIN(isa) OCTOMOE_PRAGMA(GCC push_options) OCTOMOE_PRAGMA(GCC target(isa))
#define OCTOMOE_TARGET_END OCTOMOE_PRAGMA(GCC pop_options)
#endif

// Before a loop over accumulators: only when it is unrolled early do they become registers.
// OCTOMOE_UNROLL is defined above for each compiler.
#define OCTOMOE_INLINE inline __attribute__((always_inline))
