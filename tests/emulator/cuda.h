// What CUDA C++ has built in, as far as kernels/ uses it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "emulator/machine.h"

#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
// A CTA has an operating system thread to itself while it runs.
#define __shared__ thread_local

// Dynamic shared memory, under the names that kernels declare it by. constinit: nothing is to be called before the
// first use.
namespace octomoe {
namespace sm80 {
extern constinit thread_local std::uint8_t shared[];
}
namespace sm90 {
extern constinit thread_local std::uint8_t memory[];
}
namespace kernels {
extern constinit thread_local float shared_floats[];
}
}  // namespace octomoe

struct OctomoeDim3 {
  unsigned x = 0, y = 0, z = 0;
};
extern OctomoeDim3 threadIdx, blockIdx, gridDim, blockDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// ---- numbers ----
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
// A GPU's NaN: all ones but the sign.
inline float octomoe_nan(float x) { return x == x ? x : __uint_as_float(0x7fffffffu); }
inline float __fadd_rn(float a, float b) { return octomoe_nan(a + b); }
inline float __fsub_rn(float a, float b) { return octomoe_nan(a - b); }
inline float __fmul_rn(float a, float b) { return octomoe_nan(a * b); }
inline float __fdiv_rn(float a, float b) { return octomoe_nan(a / b); }
inline float __fmaf_rn(float a, float b, float c) { return octomoe_nan(fmaf(a, b, c)); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long all = static_cast<unsigned long long>(b) << 32 | a;
  unsigned to = 0;
  for (int i = 0; i < 4; ++i) to |= static_cast<unsigned>(all >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return to;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline int __dp4a(int a, int b, int c) {
  auto sum = static_cast<unsigned>(c);
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<unsigned>(static_cast<std::int8_t>(a >> i) * static_cast<std::int8_t>(b >> i));
  }
  return static_cast<int>(sum);
}
// One thread runs at a time.
inline int atomicAdd(int* p, int v) {
  const int before = *p;
  *p += v;
  return before;
}
inline unsigned atomicMax(unsigned* to, unsigned v) {
  const unsigned old = *to;
  *to = max(old, v);
  return old;
}

// ---- CTA and warp ----
inline void __syncthreads() { octomoe::emulator::cta_barrier(0, 0); }
inline void __syncwarp() { octomoe::emulator::exchange("__syncwarp", ~0u, {}); }

inline int __shfl_sync(unsigned mask, int v, int from) {
  return static_cast<int>(
      octomoe::emulator::exchange("__shfl_sync", mask, {{static_cast<unsigned>(v)}})[from & 31].v[0]);
}
inline float __shfl_sync(unsigned mask, float v, int from) {
  return __int_as_float(__shfl_sync(mask, __float_as_int(v), from));
}
inline int __shfl_up_sync(unsigned mask, int v, unsigned by) {
  const auto* all = octomoe::emulator::exchange("__shfl_up_sync", mask, {{static_cast<unsigned>(v)}});
  const int lane = octomoe::emulator::lane(), from = lane - static_cast<int>(by);
  return static_cast<int>(all[from < 0 ? lane : from].v[0]);
}
inline unsigned octomoe_shfl_xor(unsigned mask, unsigned v, int by) {
  return octomoe::emulator::exchange("__shfl_xor_sync", mask, {{v}})[octomoe::emulator::lane() ^ by].v[0];
}
inline int __shfl_xor_sync(unsigned mask, int v, int by) {
  return static_cast<int>(octomoe_shfl_xor(mask, static_cast<unsigned>(v), by));
}
inline float __shfl_xor_sync(unsigned mask, float v, int by) {
  return __uint_as_float(octomoe_shfl_xor(mask, __float_as_uint(v), by));
}
inline unsigned __shfl_xor_sync(unsigned mask, unsigned v, int by) { return octomoe_shfl_xor(mask, v, by); }
inline unsigned __ballot_sync(unsigned mask, bool v) {
  const auto* all = octomoe::emulator::exchange("__ballot_sync", mask, {{v}});
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= all[i].v[0] << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool v) { return __ballot_sync(mask, v) != 0; }
inline unsigned __match_any_sync(unsigned mask, int v) {
  const auto* all = octomoe::emulator::exchange("__match_any_sync", mask, {{static_cast<unsigned>(v)}});
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (all[i].v[0] == static_cast<unsigned>(v) ? 1u : 0u) << i;
  return bits;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  const auto* all = octomoe::emulator::exchange("__reduce_add_sync", mask, {{v}});
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += all[i].v[0];
  return sum;
}
inline int __reduce_max_sync(unsigned mask, int v) {
  const auto* all = octomoe::emulator::exchange("__reduce_max_sync", mask, {{static_cast<unsigned>(v)}});
  int top = v;
  for (int i = 0; i < 32; ++i) top = max(top, static_cast<int>(all[i].v[0]));
  return top;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  const auto* all = octomoe::emulator::exchange("__reduce_max_sync", mask, {{v}});
  unsigned top = 0;
  for (int i = 0; i < 32; ++i) top = max(top, all[i].v[0]);
  return top;
}
