// Stands for kernels/ptx/sm80.cuh: the same wrappers, done by the emulator.
#pragma once

#include <cstring>
#include <stdexcept>

#include "core/types.h"
#include "emulator/cuda.h"

namespace octomoe::ptx {

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  emulator::cp_async(shared, global, 16, valid);
}
inline void cp_async_4(uint32_t shared, const void* global, bool valid) {
  emulator::cp_async(shared, global, 4, valid);
}
inline void cp_async_16_if(bool issue, uint32_t shared, const void* global, bool valid) {
  if (issue) emulator::cp_async(shared, global, 16, valid);
}
inline void cp_async_4_if(bool issue, uint32_t shared, const void* global) {
  if (issue) emulator::cp_async(shared, global, 4, true);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int kPending>
inline void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

inline int32_t load_relaxed(const int32_t* global) { return *global; }

inline void discard_line(bool wanted, const void* line) {
  if (!wanted) return;
  if (reinterpret_cast<std::uintptr_t>(line) % 128 != 0) throw std::runtime_error("discard_line: not aligned");
  std::memset(const_cast<void*>(line), 0xd5, 128);
}

inline int32_t load_shared(uint32_t shared) {
  int32_t d;
  std::memcpy(&d, emulator::shared_bytes(shared, 4), 4);
  return d;
}
inline int32_t load_shared_byte(uint32_t shared) { return *emulator::shared_bytes(shared, 1); }
inline int2 load_shared_2(uint32_t shared) {
  int2 d;
  std::memcpy(&d, emulator::shared_bytes(shared, 8), 8);
  return d;
}

template <int kN>
inline void load_shared_n(int32_t (&d)[kN], uint32_t shared) {
  if (shared % (kN >= 4 ? 16 : kN * 4) != 0) throw std::runtime_error("load_shared_n: not aligned");
  std::memcpy(d, emulator::shared_bytes(shared, kN * 4), kN * 4);
}
template <int kN>
inline void store_if(bool wanted, void* global, const uint32_t (&v)[kN]) {
  if (!wanted) return;
  if (reinterpret_cast<std::uintptr_t>(global) % (kN * 4) != 0) throw std::runtime_error("store_if: not aligned");
  std::memcpy(global, v, kN * 4);
}
inline int32_t here(int32_t value) { return value; }
inline uint64_t here(uint64_t value) { return value; }
inline int32_t uniform(int32_t value) {
  const auto most = __reduce_max_sync(~0u, value);
  if (most != value) throw std::runtime_error("uniform: the lanes differ");
  return most;
}

inline void barrier_init(uint32_t barrier, int count) { emulator::barrier_init(barrier, count); }
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier); }
inline void cp_async_arrive(uint32_t barrier) { emulator::cp_async_arrive(barrier); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }

// Matrix i of 8 rows of 16 bytes: lanes 8i to 8i + 7 give its rows' addresses, lane l gets word l % 4 of row l / 4.
template <int kMatrices>
inline void load_matrices(const char* instruction, uint32_t* r, uint32_t shared) {
  const emulator::LaneValues* all = emulator::exchange(instruction, ~0u, {{shared}});
  for (int i = 0; i < kMatrices; ++i) {
    const int l = emulator::lane();
    std::memcpy(&r[i], emulator::shared_bytes(all[8 * i + l / 4].v[0], 16) + l % 4 * 4, 4);
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) { load_matrices<4>("ldmatrix.x4", r, shared); }
inline void ldmatrix_x2(uint32_t& r0, uint32_t& r1, uint32_t shared) {
  uint32_t r[2];
  load_matrices<2>("ldmatrix.x2", r, shared);
  r0 = r[0];
  r1 = r[1];
}

// Lane 4g + q holds words q and q + 4 of rows g and g + 8 of a, of column g of b, and has sums of those rows and
// columns 2q and 2q + 1.
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::LaneValues* all = emulator::exchange("mma.m16n8k32", ~0u, {{a[0], a[1], a[2], a[3], b0, b1}});
  const int l = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = l / 4 * 4, column = (l % 4 * 2 + i % 2) * 4;
    for (int q = 0; q < 4; ++q) {
      for (int half = 0; half < 2; ++half) {
        d[i] = __dp4a(static_cast<int>(all[row + q].v[2 * half + i / 2]), static_cast<int>(all[column + q].v[4 + half]),
                      d[i]);
      }
    }
  }
}
inline void mma_s8_from(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int32_t c) {
  for (int32_t& v : d) v = c;
  mma_s8(d, a, b0, b1);
}

}  // namespace octomoe::ptx
