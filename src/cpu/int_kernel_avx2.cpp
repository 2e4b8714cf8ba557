// INT8 on AVX2: int16 activations, weights sign-extended on the way in, vpmaddwd + vpaddd. Exact for every value,
// -128 included; vpmaddubsw would double the products per instruction but saturates at 2 * 127 * 255.
//
// Register tile 6 rows x 16 columns: 12 accumulators, 2 weight vectors, 1 broadcast, 1 product. A step of two K is
// 2 vpmovsxbw + 12 vpmaddwd + 12 vpaddd on four pipes, 92 % of what vpmaddwd's two pipes could do. Up to 3 rows both
// panels of a unit share the broadcasts.
#include "cpu/kernel.h"
#include "cpu/target.h"

#if OCTOMOE_X86
#include <immintrin.h>

namespace octomoe::cpu {
OCTOMOE_TARGET_BEGIN("avx2,fma")
namespace {

#include "cpu/int_kernel-inl.h"

struct Avx2 {
  static constexpr int kJoint = 3, kSingle = 6, kRowBytes = 2, kSlice = 512;
  struct Ints {
    __m256i v[2];
  };
  struct Floats {
    __m256 v[2];
  };

  static OCTOMOE_INLINE Ints zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static OCTOMOE_INLINE Ints broadcast(std::int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
  static OCTOMOE_INLINE Floats broadcast(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static OCTOMOE_INLINE Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static OCTOMOE_INLINE Ints load(const std::int32_t* p) {
    return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))}};
  }
  static OCTOMOE_INLINE void store(float* p, const Floats& x) {
    _mm256_storeu_ps(p, x.v[0]);
    _mm256_storeu_ps(p + 8, x.v[1]);
  }
  static OCTOMOE_INLINE void store(std::int32_t* p, const Ints& x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.v[1]);
  }
  static OCTOMOE_INLINE Floats convert(const Ints& x) {
    return {{_mm256_cvtepi32_ps(x.v[0]), _mm256_cvtepi32_ps(x.v[1])}};
  }
  static OCTOMOE_INLINE Floats mul(const Floats& a, const Floats& b) {
    return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
  }
  static OCTOMOE_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
  }
  static OCTOMOE_INLINE Ints mul(const Ints& a, const Ints& b) {
    return {{_mm256_mullo_epi32(a.v[0], b.v[0]), _mm256_mullo_epi32(a.v[1], b.v[1])}};
  }
  static OCTOMOE_INLINE Ints add(const Ints& a, const Ints& b) {
    return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
  }
  static OCTOMOE_INLINE Floats weight_scale(const float* p, int width) { return width == 1 ? broadcast(*p) : load(p); }
  static OCTOMOE_INLINE Ints weight_q(const std::uint8_t* p, int width) {
    if (width == 1) return broadcast(static_cast<std::int32_t>(*p));
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {{_mm256_cvtepu8_epi32(q), _mm256_cvtepu8_epi32(_mm_srli_si128(q, 8))}};
  }

  // acc += pairs of x times pairs of w. Written out, because GCC reassociates the additions of neighbouring steps,
  // needs more than 16 registers for it and spills half of the accumulators (55 instead of 75 GMAC/s on Zen 4).
  static OCTOMOE_INLINE void multiply_add(__m256i& acc, __m256i x, __m256i w) {
    __m256i product;
    asm("vpmaddwd %[w], %[x], %[t]\n\tvpaddd %[t], %[acc], %[acc]"
        : [acc] "+x"(acc), [t] "=&x"(product)
        : [x] "x"(x), [w] "x"(w));
  }

  template <int M, int P>
  static OCTOMOE_INLINE void dot(Ints (&acc)[M][P], const char* a, std::int64_t a_stride, const std::int8_t* w,
                                 std::int64_t panel_bytes, std::int64_t length, const char*& ahead,
                                 std::int64_t& lines) {
    const auto step = [&](std::int64_t k) __attribute__((always_inline)) {
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) {
        const auto* q = reinterpret_cast<const __m128i*>(w + p * panel_bytes + k * kPanel);
        const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(q));
        const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1));
        OCTOMOE_UNROLL
        for (int m = 0; m < M; ++m) {
          std::int32_t pair;
          __builtin_memcpy(&pair, a + m * a_stride + k * kRowBytes, 4);
          const __m256i x = _mm256_set1_epi32(pair);
          multiply_add(acc[m][p].v[0], x, w0);
          multiply_add(acc[m][p].v[1], x, w1);
        }
      }
    };
    // One 64-byte line of each panel is four K: fetch as many lines of the next unit.
    for (std::int64_t k = 0; k < length; k += 4) {
      OCTOMOE_UNROLL
      for (int p = 0; p < P; ++p) {
        if (lines > 0) _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += 64;
        --lines;
      }
      step(k);
      step(k + 2);
    }
  }
};

}  // namespace

void int_kernel_avx2(const IntUnit& u) { IntDriver<Avx2>::run(u); }

OCTOMOE_TARGET_END
}  // namespace octomoe::cpu
#else
namespace octomoe::cpu {
void int_kernel_avx2(const IntUnit& u) { int_kernel_portable(u); }
}  // namespace octomoe::cpu
#endif
