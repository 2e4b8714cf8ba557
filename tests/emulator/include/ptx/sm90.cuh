// Stands for kernels/ptx/sm90.cuh: the same wrappers, done by the emulator.
#pragma once

#include "core/cache_hint.h"
#include "core/tensor_map.h"
#include "ptx/numerics.cuh"
#include "ptx/sm80.cuh"

namespace octomoe::ptx {

inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulator::barrier_expect(barrier, bytes); }
inline void barrier_init_fence() {}
inline void fence_proxy_async() { emulator::fence_proxy_async(); }
inline void prefetch_tensor_map(const kernels::TensorMap*) {}

// What it fetches has to be there: a byte of each page, and the last one, are read.
inline void prefetch_bulk(const void* global, uint32_t bytes) {
  if ((reinterpret_cast<std::uintptr_t>(global) | bytes) % 16 != 0)
    throw std::runtime_error("prefetch_bulk: not aligned");
  const auto* from = static_cast<const volatile uint8_t*>(global);
  for (uint32_t i = 0; i < bytes; i += 4096) static_cast<void>(from[i]);
  if (bytes > 0) static_cast<void>(from[bytes - 1]);
}
inline void load_once(int4& to, const void* from, bool wanted) {
  if (!wanted) return;
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) throw std::runtime_error("load_once: not aligned");
  std::memcpy(&to, from, 16);
}
inline void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint64_t) {
  emulator::copy_bulk(shared, global, bytes, barrier);
}
template <int kN>
inline void store_if(bool wanted, void* global, const uint32_t (&v)[kN], uint64_t) {
  store_if(wanted, global, v);
}
// Pairs of 16-bit floats, each half added and rounded by itself.
template <int kN, class ToFloat, class FromFloats>
inline void add_if(bool wanted, void* global, const uint32_t (&v)[kN], const ToFloat& to_float,
                   const FromFloats& from_floats) {
  static_assert(kN == 2 || kN == 4);
  if (!wanted) return;
  if (reinterpret_cast<std::uintptr_t>(global) % (kN * 4) != 0) throw std::runtime_error("add_if: not aligned");
  uint32_t all[kN];
  std::memcpy(all, global, sizeof(all));
  for (int i = 0; i < kN; ++i) {
    const auto half = [&](int h) {
      return to_float(static_cast<uint16_t>(all[i] >> 16 * h)) + to_float(static_cast<uint16_t>(v[i] >> 16 * h));
    };
    all[i] = from_floats(half(1), half(0));
  }
  std::memcpy(global, all, sizeof(all));
}
template <int kN>
inline void add_bf16_if(bool wanted, void* global, const uint32_t (&v)[kN], uint64_t) {
  add_if(
      wanted, global, v, [](uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); }, to_bf16x2);
}
template <int kN>
inline void add_fp16_if(bool wanted, void* global, const uint32_t (&v)[kN], uint64_t) {
  add_if(wanted, global, v, from_fp16, to_fp16x2);
}
inline void copy_box_5d(uint32_t shared, const kernels::TensorMap* map, int32_t c0, int32_t c1, int32_t c2, int32_t c3,
                        int32_t c4, uint32_t barrier, uint64_t) {
  emulator::copy_box(shared, map, {c0, c1, c2, c3, c4}, barrier, 1u << emulator::cluster_rank());
}
inline void copy_box_2d(uint32_t shared, const kernels::TensorMap* map, int32_t column, int32_t row, uint32_t barrier) {
  emulator::copy_box(shared, map, {column, row, 0, 0, 0}, barrier, 1u << emulator::cluster_rank());
}
inline void copy_box_5d_multicast(uint32_t shared, const kernels::TensorMap* map, int32_t c0, int32_t c1, int32_t c2,
                                  int32_t c3, int32_t c4, uint32_t barrier, uint64_t, uint16_t mask) {
  emulator::copy_box(shared, map, {c0, c1, c2, c3, c4}, barrier, mask);
}

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) { emulator::barrier_arrive_at(barrier, rank); }
inline void send_word(uint32_t to, uint32_t barrier, uint32_t rank, int32_t word) {
  emulator::send_word(to, barrier, rank, word);
}
inline int32_t load_remote(uint32_t shared, uint32_t rank) { return emulator::load_remote(shared, rank); }
inline void cluster_sync() { emulator::cluster_barrier(); }

inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16;
}

}  // namespace octomoe::ptx
