#include "cpu/isa.h"

#include <cstdlib>

#include "cpu/target.h"

#if OCTOMOE_X86
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
// FPCR is read and written below
#endif

namespace octomoe::cpu {

const char* to_string(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::vnni:
      return "avx512_vnni";
    case Isa::amx:
      return "amx";
  }
  return "?";
}

Isa parse_isa(const std::string& name) {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::vnni, Isa::amx}) {
    if (name == to_string(isa)) return isa;
  }
  throw Error(ErrorCode::invalid_argument,
              "OCTOMOE_CPU_ISA: expected portable, avx2, avx512_vnni or amx, got '" + name + "'");
}

#if OCTOMOE_X86
namespace {

// Tile data is switched off for a process until it asks: the state is 8 KB a thread. The permission is inherited by
// threads made later and holds for the existing ones.
bool request_amx() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

bool cpu_has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  return (d & kBf16) && (d & kTile) && (d & kInt8);
}

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::portable};
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));  // F16C
  }();
  if (!avx2) return found;
  found.push_back(Isa::avx2);
  const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  if (!vnni) return found;
  found.push_back(Isa::vnni);
  if (cpu_has_amx() && request_amx()) found.push_back(Isa::amx);
  return found;
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

FloatEnv::FloatEnv() : saved_(_mm_getcsr()) {
  constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, nearest even, no FTZ, no DAZ
  if ((saved_ & ~0x3fu) != kDefault) _mm_setcsr(kDefault);
}
FloatEnv::~FloatEnv() {
  if (_mm_getcsr() != saved_) _mm_setcsr(static_cast<unsigned>(saved_));
}

#else

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> found{Isa::portable};
  return found;
}

#if defined(__aarch64__)
FloatEnv::FloatEnv() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  if (saved_ != 0) asm volatile("msr fpcr, %0" ::"r"(std::uint64_t{0}));
}
FloatEnv::~FloatEnv() {
  if (saved_ != 0) asm volatile("msr fpcr, %0" ::"r"(saved_));
}
#else
FloatEnv::FloatEnv() : saved_(0) {}
FloatEnv::~FloatEnv() = default;
#endif

#endif

Isa best_isa() {
  const std::vector<Isa>& found = available_isas();
  const char* wanted = std::getenv("OCTOMOE_CPU_ISA");
  if (!wanted || !*wanted) return found.back();
  const Isa isa = parse_isa(wanted);
  for (const Isa f : found) {
    if (f == isa) return isa;
  }
  throw Error(ErrorCode::unsupported,
              std::string("OCTOMOE_CPU_ISA=") + wanted + ": this machine has " + to_string(found.back()) + " at most");
}

const char* isa_name() { return to_string(best_isa()); }

}  // namespace octomoe::cpu
