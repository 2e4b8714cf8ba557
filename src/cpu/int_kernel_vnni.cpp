// INT8 on AVX-512 VNNI. vpdpbusd multiplies unsigned by signed bytes: weights are the unsigned side as w + 128 (one xor
// as they are loaded), activations the signed one, broadcast from memory. The surplus 128 * sum(a) depends on the row
// alone and is counted by the same instruction, with bytes of 128 in the weights' place. Exact for every value.
//
// Register tile 8 rows x 32 columns: 16 accumulators, 8 row sums, 2 weight vectors, 1 broadcast.
#include "cpu/kernel.h"
#include "cpu/target.h"

#if OCTOMOE_X86
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers: _mm512_undefined_*
#endif

namespace octomoe::cpu {
OCTOMOE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
namespace {

#include "cpu/int_kernel-inl.h"
#include "cpu/vec512-inl.h"

struct Vnni : Vec512 {
  static constexpr int kJoint = 8, kSingle = 0, kRowBytes = 1, kSlice = 512;

  template <int M, int P>
  static OCTOMOE_INLINE void dot(Ints (&acc)[M][P], const char* a, std::int64_t a_stride, const std::int8_t* w,
                                 std::int64_t panel_bytes, std::int64_t length, const char*& ahead,
                                 std::int64_t& lines) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
    // Few rows wait for vpdpbusd's five clocks: they get several chains along K.
    constexpr int kChains = M <= 2 ? 4 : (M <= 4 ? 2 : 1);
    __m512i sum[kChains][M][P], extra[M];
    OCTOMOE_UNROLL
    for (int m = 0; m < M; ++m) {
      extra[m] = _mm512_setzero_si512();
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) {
        OCTOMOE_UNROLL
        for (int c = 0; c < kChains; ++c) sum[c][m][p] = _mm512_setzero_si512();
      }
    }
    const auto step = [&](std::int64_t k, int c) __attribute__((always_inline)) {
      __m512i q[P];
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) {
        if (lines > 0) _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += 64;
        --lines;
        q[p] = _mm512_xor_si512(offset, _mm512_loadu_si512(w + p * panel_bytes + k * kPanel));
      }
      OCTOMOE_UNROLL
      for (int m = 0; m < M; ++m) {
        std::int32_t four;
        __builtin_memcpy(&four, a + m * a_stride + k, 4);
        const __m512i x = _mm512_set1_epi32(four);
        OCTOMOE_UNROLL
        for (int p = 0; p < P; ++p) sum[c][m][p] = _mm512_dpbusd_epi32(sum[c][m][p], q[p], x);
      }
    };
    std::int64_t k = 0;
    for (; k + 4 * kChains <= length; k += 4 * kChains) {
      OCTOMOE_UNROLL
      for (int c = 0; c < kChains; ++c) step(k + 4 * c, c);
    }
    for (; k < length; k += 4) step(k, 0);
    // The row sums read the activations once more, 64 bytes at a time.
    OCTOMOE_UNROLL
    for (int m = 0; m < M; ++m) {
      std::int64_t i = 0;
      for (; i + 64 <= length; i += 64) {
        extra[m] = _mm512_dpbusd_epi32(extra[m], offset, _mm512_loadu_si512(a + m * a_stride + i));
      }
      if (i < length) {
        const __mmask64 rest = (std::uint64_t{1} << (length - i)) - 1;
        extra[m] = _mm512_dpbusd_epi32(extra[m], offset, _mm512_maskz_loadu_epi8(rest, a + m * a_stride + i));
      }
      const __m512i surplus = _mm512_set1_epi32(_mm512_reduce_add_epi32(extra[m]));
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) {
        OCTOMOE_UNROLL
        for (int c = 1; c < kChains; ++c) sum[0][m][p] = _mm512_add_epi32(sum[0][m][p], sum[c][m][p]);
        acc[m][p].v = _mm512_add_epi32(acc[m][p].v, _mm512_sub_epi32(sum[0][m][p], surplus));
      }
    }
  }
};

}  // namespace

void int_kernel_vnni(const IntUnit& u) { IntDriver<Vnni>::run(u); }

OCTOMOE_TARGET_END
}  // namespace octomoe::cpu
#else
namespace octomoe::cpu {
void int_kernel_vnni(const IntUnit& u) { int_kernel_portable(u); }
}  // namespace octomoe::cpu
#endif
