// INT8 and BF16 on AMX: 16 x 16 tiles of int32 or float32, 64 bytes of K a step (tdpbssd, tdpbf16ps).
//
// 2 x 2 tiles: 32 rows times both panels of a unit, four accumulators, two tiles of rows and two of weights: a step is
// four loads for four products. Rows lie in the scratch with every K-block padded with zeros to 64 bytes; weights are
// not padded: where a block ends inside a tile, the tile reads on into foreign weights, and the zeros cancel them.
#include "cpu/kernel.h"
#include "cpu/target.h"

#if OCTOMOE_X86
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers: _mm512_undefined_*
#endif

namespace octomoe::cpu {
OCTOMOE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,amx-tile,amx-int8,amx-bf16")
namespace {

#include "cpu/vec512-inl.h"

constexpr int kTileRows = 16, kTileBytes = 64;
// Up to here the vector kernel (vpdpbusd) wins, whose rows are not rounded up to 16: Emerald Rapids, 2 threads, N 1536,
// K 2048: 8 rows 113 us beside 127 us, 16 rows 197 us beside 147 us.
constexpr int kFewRows = 10;

// Tiles 0..3: sums of (row tile r, panel p) at 2r + p. 4, 5: rows. 6, 7: weights of the panels.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  TileConfig(int rows0, int rows1) {
    for (int t = 0; t < 8; ++t) bytes[t] = kTileBytes;
    rows[0] = rows[1] = rows[4] = static_cast<std::uint8_t>(rows0);
    rows[2] = rows[3] = rows[5] = static_cast<std::uint8_t>(rows1 > 0 ? rows1 : 1);
    rows[6] = rows[7] = kTileRows;
  }
};
static_assert(sizeof(TileConfig) == 64);

struct Rows {
  int first, count;  // at most 32
  int second() const { return count > kTileRows ? count - kTileRows : 0; }
};

// What is left to fetch of the next unit, and how much of it with every step.
struct Ahead {
  const char* p;
  std::int64_t lines, lines_per_step;
  OCTOMOE_INLINE void step() {
    const std::int64_t n = lines < lines_per_step ? lines : lines_per_step;
    for (std::int64_t i = 0; i < n; ++i, p += 64) _mm_prefetch(p, _MM_HINT_T1);
    lines -= n;
  }
};

// Sums of `steps` tiles along K into tiles 0..3. kStepBytes: a step's weights of a panel are 16 rows of 64 bytes.
template <bool kBf16>
OCTOMOE_INLINE void multiply(const char* a, std::int64_t a_stride, const char* w0, const char* w1, std::int64_t steps,
                             bool second, Ahead& ahead) {
  const char* a1 = a + kTileRows * a_stride;
  for (std::int64_t s = 0; s < steps; ++s) {
    ahead.step();
    _tile_loadd(6, w0, kTileBytes);
    _tile_loadd(7, w1, kTileBytes);
    _tile_loadd(4, a, static_cast<int>(a_stride));
    if constexpr (kBf16) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    }
    if (second) {
      _tile_loadd(5, a1, static_cast<int>(a_stride));
      if constexpr (kBf16) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    }
    constexpr std::int64_t kStepBytes = kTileRows * kTileBytes;
    a += kTileBytes;
    a1 += kTileBytes;
    w0 += kStepBytes;
    w1 += kStepBytes;
  }
}

OCTOMOE_INLINE void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles to [2 panels][rows][16] of 4-byte values.
OCTOMOE_INLINE void store(void* c, std::int64_t rows, const Rows& r) {
  constexpr int kStride = kPanel * 4;
  char* p0 = static_cast<char*>(c) + r.first * kStride;
  char* p1 = p0 + rows * kStride;
  _tile_stored(0, p0, kStride);
  _tile_stored(1, p1, kStride);
  if (r.second() > 0) {
    _tile_stored(2, p0 + kTileRows * kStride, kStride);
    _tile_stored(3, p1 + kTileRows * kStride, kStride);
  }
}

using V = Vec512;

// One K-block's sums, in `sums` [2][32][16], joined to the result as docs/schemes.md section 3 says.
void promote_block(const IntUnit& u, const Rows& r, std::int64_t b, const std::int32_t* sums) {
  auto* c = static_cast<float*>(u.c);
  for (int p = 0; p < 2; ++p) {
    const V::Floats sw = V::weight_scale(u.sw + (p * u.blocks + b) * u.width, u.width);
    for (int m = 0; m < r.count; ++m) {
      float* v = c + (static_cast<std::int64_t>(p) * u.rows + r.first + m) * kPanel;
      const V::Floats scale = V::mul(sw, V::broadcast(u.sa[(r.first + m) * u.blocks + b]));
      const V::Floats x = V::convert(V::load(sums + (p * 2 * kTileRows + m) * kPanel));
      V::store(v, b == 0 ? V::mul(x, scale) : V::fma(x, scale, V::load(v)));
    }
  }
}

void promote_hybrid(const IntUnit& u, const Rows& r, std::int64_t b, const std::int32_t* sums) {
  auto* c = static_cast<float*>(u.c);
  const std::int64_t g = b / u.super_group, place = (b - g * u.super_group) % u.flush_blocks;
  const bool last = place == u.flush_blocks - 1 || b == u.blocks - 1 || (b + 1) % u.super_group == 0;
  for (int p = 0; p < 2; ++p) {
    const V::Ints qw = V::weight_q(u.qw + (p * u.blocks + b) * u.width, u.width);
    const V::Floats sw = V::weight_scale(u.sw + (p * u.super_groups + g) * u.width, u.width);
    for (int m = 0; m < r.count; ++m) {
      const std::int64_t at = (static_cast<std::int64_t>(p) * u.rows + r.first + m) * kPanel;
      const V::Ints q = V::mul(qw, V::broadcast(u.qa[(r.first + m) * u.blocks + b]));
      V::Ints sum = V::mul(q, V::load(sums + (p * 2 * kTileRows + m) * kPanel));
      if (place != 0) sum = V::add(sum, V::load(u.chunk + at));
      if (!last) {
        V::store(u.chunk + at, sum);
        continue;
      }
      const V::Floats scale = V::mul(sw, V::broadcast(u.sa[(r.first + m) * u.super_groups + g]));
      const V::Floats x = V::convert(sum);
      V::store(c + at, b < u.flush_blocks && g == 0 ? V::mul(x, scale) : V::fma(x, scale, V::load(c + at)));
    }
  }
}

void run_rows(const IntUnit& u, const Rows& r, Ahead ahead) {
  alignas(64) std::int32_t sums[2 * 2 * kTileRows * kPanel];
  const char* a = static_cast<const char*>(u.a) + r.first * u.a_stride;
  const auto* w = reinterpret_cast<const char*>(u.w);
  for (std::int64_t b = 0; b < u.blocks; ++b) {
    const std::int64_t first = b * u.block_k, length = first + u.block_k <= u.k ? u.block_k : u.k - first;
    clear();
    multiply<false>(a + b * u.a_block_stride, u.a_stride, w + first * kPanel, w + u.panel_bytes + first * kPanel,
                    (length + kTileBytes - 1) / kTileBytes, r.second() > 0, ahead);
    if (u.promote == Promote::none) {
      store(u.c, u.rows, r);
      continue;
    }
    store(sums, 2 * kTileRows, {0, r.count});
    u.promote == Promote::block ? promote_block(u, r, b, sums) : promote_hybrid(u, r, b, sums);
  }
}

// fn(rows, ahead) for tiles of 32 rows, the tile registers shaped for each.
template <class Fn>
void for_rows(int rows, const char* prefetch, std::int64_t prefetch_bytes, const Fn& fn) {
  const int tiles = (rows + 2 * kTileRows - 1) / (2 * kTileRows);
  const std::int64_t lines = prefetch ? prefetch_bytes / 64 / tiles : 0;
  const std::int64_t lines_per_step = (2 * kTileRows + tiles - 1) / tiles;  // a step reads 32 lines of weights
  int shaped = 0;
  for (int i = 0; i < tiles; ++i) {
    const Rows r{i * 2 * kTileRows,
                 rows - i * 2 * kTileRows < 2 * kTileRows ? rows - i * 2 * kTileRows : 2 * kTileRows};
    if (r.count != shaped) {
      const TileConfig config(r.count < kTileRows ? r.count : kTileRows, r.second());
      asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic reads 8 of the 64 bytes in the compiler's eyes
      _tile_loadconfig(&config);
      shaped = r.count;
    }
    fn(r, Ahead{prefetch + i * lines * 64, lines, lines_per_step});
  }
  _tile_release();
}

}  // namespace

void int_kernel_amx(const IntUnit& u) {
  if (u.rows <= kFewRows) return int_kernel_vnni(u);
  for_rows(u.rows, u.prefetch, 2 * u.panel_bytes, [&](const Rows& r, const Ahead& ahead) { run_rows(u, r, ahead); });
}

void float_kernel_amx(const FloatUnit& u) {
  for_rows(u.rows, u.prefetch, 2 * u.panel_bytes, [&](const Rows& r, Ahead ahead) {
    const auto* w = reinterpret_cast<const char*>(u.w);
    constexpr std::int64_t kColumns = kTileBytes / 2;
    clear();
    multiply<true>(static_cast<const char*>(u.a) + r.first * u.a_stride, u.a_stride, w, w + u.panel_bytes,
                   u.k / kColumns, r.second() > 0, ahead);
    store(u.c, u.rows, r);
  });
}

OCTOMOE_TARGET_END
}  // namespace octomoe::cpu
#else
namespace octomoe::cpu {
void int_kernel_amx(const IntUnit& u) { int_kernel_portable(u); }
void float_kernel_amx(const FloatUnit& u) { float_kernel_portable(u); }
}  // namespace octomoe::cpu
#endif
