// INT8 in plain loops over 16 columns, for machines that have no kernel of their own. Compilers vectorise them.
#include <cmath>

#include "cpu/kernel.h"
#include "cpu/target.h"

namespace octomoe::cpu {
namespace {

#include "cpu/int_kernel-inl.h"

struct Plain {
  static constexpr int kJoint = 1, kSingle = 1, kRowBytes = 2, kSlice = 512;
  struct Ints {
    std::int32_t v[kPanel];
  };
  struct Floats {
    float v[kPanel];
  };

  template <class Fn>
  static OCTOMOE_INLINE Floats floats(const Fn& fn) {
    Floats r;
    for (int i = 0; i < kPanel; ++i) r.v[i] = fn(i);
    return r;
  }
  template <class Fn>
  static OCTOMOE_INLINE Ints ints(const Fn& fn) {
    Ints r;
    for (int i = 0; i < kPanel; ++i) r.v[i] = fn(i);
    return r;
  }
  static Ints zero() { return {}; }
  static Ints broadcast(std::int32_t x) {
    return ints([&](int) { return x; });
  }
  static Floats broadcast(float x) {
    return floats([&](int) { return x; });
  }
  static Floats load(const float* p) {
    return floats([&](int i) { return p[i]; });
  }
  static Ints load(const std::int32_t* p) {
    return ints([&](int i) { return p[i]; });
  }
  static void store(float* p, const Floats& x) { __builtin_memcpy(p, x.v, sizeof(x.v)); }
  static void store(std::int32_t* p, const Ints& x) { __builtin_memcpy(p, x.v, sizeof(x.v)); }
  static Floats convert(const Ints& x) {
    return floats([&](int i) { return static_cast<float>(x.v[i]); });
  }
  static Floats mul(const Floats& a, const Floats& b) {
    return floats([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return floats([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static Ints mul(const Ints& a, const Ints& b) {
    return ints([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Ints add(const Ints& a, const Ints& b) {
    return ints([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Floats weight_scale(const float* p, int width) { return width == 1 ? broadcast(*p) : load(p); }
  static Ints weight_q(const std::uint8_t* p, int width) {
    return ints([&](int i) { return static_cast<std::int32_t>(p[width == 1 ? 0 : i]); });
  }

  template <int M, int P>
  static void dot(Ints (&acc)[M][P], const char* a, std::int64_t a_stride, const std::int8_t* w,
                  std::int64_t panel_bytes, std::int64_t length, const char*&, std::int64_t&) {
    for (int m = 0; m < M; ++m) {
      const auto* x = reinterpret_cast<const std::int16_t*>(a + m * a_stride);
      for (int p = 0; p < P; ++p) {
        const std::int8_t* q = w + p * panel_bytes;
        std::int32_t sum[kPanel] = {};
        for (std::int64_t k = 0; k < length; k += 2, q += 2 * kPanel) {
          const std::int32_t x0 = x[k], x1 = x[k + 1];
          for (int i = 0; i < kPanel; ++i) sum[i] += x0 * q[2 * i] + x1 * q[2 * i + 1];
        }
        for (int i = 0; i < kPanel; ++i) acc[m][p].v[i] += sum[i];
      }
    }
  }
};

}  // namespace

void int_kernel_portable(const IntUnit& u) { IntDriver<Plain>::run(u); }

}  // namespace octomoe::cpu
