// bf16, fp16 and int4 weights times float32 rows, float32 accumulate. One body per Highway target.
//
// Every output element is summed along K by one chain of fused multiply-adds, whatever the tile around it looks like:
// a result depends neither on the other rows of a batch nor on the number of threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/float_kernel.cpp"
#include "cpu/hwy_targets.h"
//
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

#include <algorithm>

#include "cpu/kernel.h"
#include "cpu/target.h"

HWY_BEFORE_NAMESPACE();
namespace octomoe::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

using D = hn::CappedTag<float, kPanel>;
using DU = hn::RebindToUnsigned<D>;
using DI = hn::RebindToSigned<D>;
using V = hn::Vec<D>;

constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
constexpr int kVecs = kPanel / kLanes;  // vectors of a panel
// Accumulators that leave room for weights, a broadcast and a decoding step: 16 registers on AVX2, 32 elsewhere.
constexpr int kAccumulators = HWY_TARGET == HWY_AVX2 ? 12 : 24;
constexpr int kJoint = std::max(1, kAccumulators / (2 * kVecs));
constexpr int kSingle = std::max(1, kAccumulators / kVecs);
constexpr std::int64_t kSlice = 512;  // columns of K whose weights and rows stay in the first-level cache

struct Tile {
  int row, panel;
  std::int64_t begin, end;  // columns
  const char* ahead;
  std::int64_t steps;  // fetches left, kBytesPerStep apart
};

// How a format's panel turns into vectors: kStep columns lie together in kBytesPerStep, column j of them is decoded by
// column<j>(). It is loaded anew for every j (see `step`).
struct Bf16 {
  static constexpr int kStep = 1;
  static constexpr std::int64_t kBytesPerStep = 32;
  template <int J>
  static HWY_INLINE V column(const std::uint8_t* w, int i) {
    const hn::Rebind<std::uint16_t, D> dh;
    const auto half = hn::LoadU(dh, reinterpret_cast<const std::uint16_t*>(w) + i * kLanes);
    return hn::BitCast(D(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), half)));
  }
};
struct Fp16 {
  static constexpr int kStep = 1;
  static constexpr std::int64_t kBytesPerStep = 32;
  template <int J>
  static HWY_INLINE V column(const std::uint8_t* w, int i) {
    const hn::Rebind<hwy::float16_t, D> dh;
    return hn::PromoteTo(D(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(w) + i * kLanes));
  }
};
struct Int4 {
  static constexpr int kStep = 8;
  static constexpr std::int64_t kBytesPerStep = 64;
  template <int J>
  static HWY_INLINE V column(const std::uint8_t* w, int i) {
    const auto eight = hn::LoadU(DI(), reinterpret_cast<const std::int32_t*>(w) + i * kLanes);
    return hn::ConvertTo(D(), hn::ShiftRight<28>(hn::ShiftLeft<28 - 4 * J>(eight)));
  }
};

// Columns J, J + 1, ... of a step. The empty asm keeps the compiler from holding loaded weights or broadcasts from one
// column to the next: with 12 accumulators there is no register for them, and it would spill accumulators instead.
template <class Format, int M, int J = 0>
HWY_INLINE void step(const char* a, std::int64_t a_stride, const std::uint8_t* w, V (&acc)[M][kVecs]) {
  V x[kVecs];
  OCTOMOE_UNROLL
  for (int i = 0; i < kVecs; ++i) x[i] = Format::template column<J>(w, i);
  OCTOMOE_UNROLL
  for (int m = 0; m < M; ++m) {
    const V b = hn::Set(D(), reinterpret_cast<const float*>(a + m * a_stride)[J]);
    OCTOMOE_UNROLL
    for (int i = 0; i < kVecs; ++i) acc[m][i] = hn::MulAdd(b, x[i], acc[m][i]);
  }
  asm volatile("" ::: "memory");
  if constexpr (J + 1 < Format::kStep) step<Format, M, J + 1>(a, a_stride, w, acc);
}

// The sum over columns [begin, end) of M rows and P panels, on top of acc.
template <class Format, int M, int P>
HWY_INLINE void dot(const FloatUnit& u, Tile& t, std::int64_t begin, std::int64_t end, V (&acc)[P][M][kVecs]) {
  const char* a = static_cast<const char*>(u.a) + t.row * u.a_stride + begin * 4;
  const std::uint8_t* w = u.w + t.panel * u.panel_bytes + begin / Format::kStep * Format::kBytesPerStep;
  for (std::int64_t k = begin; k < end; k += Format::kStep) {
    OCTOMOE_UNROLL
    for (int p = 0; p < P; ++p) {
      if (t.steps > 0) __builtin_prefetch(t.ahead, 0, 2);
      t.ahead += Format::kBytesPerStep;
      --t.steps;
      step<Format, M>(a, u.a_stride, w + p * u.panel_bytes, acc[p]);
    }
    a += Format::kStep * 4;
    w += Format::kBytesPerStep;
  }
}

template <int M, int P>
HWY_INLINE float* at(const FloatUnit& u, const Tile& t, int m, int p) {
  return u.c + ((t.panel + p) * u.rows + t.row + m) * kPanel;
}

template <class Format, int M, int P>
void run_tile(const FloatUnit& u, Tile t) {
  const D d;
  V acc[P][M][kVecs];
#define EACH                                 \
  OCTOMOE_UNROLL                             \
  for (int m = 0; m < M; ++m) OCTOMOE_UNROLL \
  for (int p = 0; p < P; ++p) OCTOMOE_UNROLL \
  for (int i = 0; i < kVecs; ++i)
  if (u.sw == nullptr) {
    if (t.begin == 0) {
      EACH acc[p][m][i] = hn::Zero(d);
    } else {
      EACH acc[p][m][i] = hn::LoadU(d, at<M, P>(u, t, m, p) + i * kLanes);
    }
    dot<Format, M, P>(u, t, t.begin, t.end, acc);
    EACH hn::StoreU(acc[p][m][i], d, at<M, P>(u, t, m, p) + i * kLanes);
    return;
  }
  for (std::int64_t begin = t.begin; begin < t.end; begin += u.group) {
    EACH acc[p][m][i] = hn::Zero(d);
    dot<Format, M, P>(u, t, begin, std::min(begin + u.group, u.k), acc);
    const std::int64_t g = begin / u.group;
    EACH {
      float* v = at<M, P>(u, t, m, p) + i * kLanes;
      const float* sw = u.sw + ((t.panel + p) * u.groups + g) * kPanel + i * kLanes;
      const V scale = hn::Mul(hn::LoadU(d, sw), hn::Set(d, u.sa[t.row + m]));
      hn::StoreU(g == 0 ? hn::Mul(acc[p][m][i], scale) : hn::MulAdd(acc[p][m][i], scale, hn::LoadU(d, v)), d, v);
    }
  }
#undef EACH
}

template <class Format, int P, int M>
HWY_INLINE void dispatch(int m, const FloatUnit& u, const Tile& t) {
  if constexpr (M > 0) {
    if (m == M) return run_tile<Format, M, P>(u, t);
    dispatch<Format, P, M - 1>(m, u, t);
  }
}

// Tiles of rows and slices of K, as IntDriver::run.
template <class Format>
void run(const FloatUnit& u) {
  constexpr bool kOnlyJoint = kJoint >= 8;
  const bool joint = kOnlyJoint || u.rows <= kJoint;
  const int most = joint ? kJoint : kSingle;
  const int tiles = (u.rows + most - 1) / most, passes = joint ? 1 : 2;
  const bool groups = u.sw != nullptr;
  std::int64_t slice = tiles == 1 ? u.k : kSlice;
  if (groups) slice = (slice + u.group - 1) / u.group * u.group;
  const std::int64_t slices = (u.k + slice - 1) / slice;
  const std::int64_t steps = u.prefetch ? 2 * u.panel_bytes / Format::kBytesPerStep / (tiles * passes * slices) : 0;
  const char* ahead = u.prefetch;
  for (int p = 0; p < passes; ++p) {
    for (std::int64_t begin = 0; begin < u.k; begin += slice) {
      for (int i = 0, row = 0; i < tiles; ++i, ahead += steps * Format::kBytesPerStep) {
        const int m = u.rows / tiles + (i < u.rows % tiles);
        const Tile t{row, p, begin, std::min(begin + slice, u.k), ahead, steps};
        if constexpr (kOnlyJoint) {
          dispatch<Format, 2, kJoint>(m, u, t);
        } else {
          joint ? dispatch<Format, 2, kJoint>(m, u, t) : dispatch<Format, 1, kSingle>(m, u, t);
        }
        row += m;
      }
    }
  }
}

}  // namespace

void FloatProduct(const FloatUnit& u) {
  switch (u.format) {
    case FloatWeight::bf16:
      return run<Bf16>(u);
    case FloatWeight::fp16:
      return run<Fp16>(u);
    case FloatWeight::int4:
      return run<Int4>(u);
  }
}

}  // namespace octomoe::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octomoe::cpu {
namespace {
HWY_EXPORT(FloatProduct);
}
void float_kernel(const FloatUnit& u) { HWY_DYNAMIC_DISPATCH(FloatProduct)(u); }
void float_kernel_portable(const FloatUnit& u) { HWY_STATIC_DISPATCH(FloatProduct)(u); }
}  // namespace octomoe::cpu
#endif
