// Types shared by device code and the host code that launches it. NVRTC has no <cstdint>.
#pragma once

#if defined(__CUDACC__)
#define OCTOMOE_HD __host__ __device__
#else
#define OCTOMOE_HD
#endif

#if defined(__CUDACC_RTC__)
namespace octomoe {
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
}  // namespace octomoe
#else
#include <cstdint>
namespace octomoe {
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
}  // namespace octomoe
#endif

namespace octomoe::kernels {
// A if kFirst, else B: NVRTC has no <type_traits> either.
template <bool kFirst, typename A, typename B>
struct EitherOf {
  using Type = A;
};
template <typename A, typename B>
struct EitherOf<false, A, B> {
  using Type = B;
};
template <bool kFirst, typename A, typename B>
using Either = typename EitherOf<kFirst, A, B>::Type;
}  // namespace octomoe::kernels
