#include "cpu/memory.h"

#include <string>

#include "octomoe/error.h"

#if defined(__linux__)
#include <sys/mman.h>
#else
#include <cstdlib>
#include <cstring>
#endif

namespace octomoe::cpu {
namespace {

[[noreturn]] void out_of_memory(std::size_t bytes) {
  throw Error(ErrorCode::out_of_memory, "CPU engine: cannot allocate " + std::to_string(bytes) + " bytes");
}

}  // namespace

#if defined(__linux__)

// Below two huge pages malloc-sized granularity is enough.
HugeBuffer::HugeBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  constexpr std::size_t kHuge = std::size_t{2} << 20;
  const bool huge = bytes >= 2 * kHuge;
  mapped_ = (bytes + 4095) / 4096 * 4096;
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    size_ = mapped_ = 0;
    out_of_memory(bytes);
  }
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(p, mapped_, MADV_HUGEPAGE);  // refused on some systems: small pages then
#endif
  data_ = p;
}
HugeBuffer::~HugeBuffer() {
  if (data_) munmap(data_, mapped_);
}

#else

HugeBuffer::HugeBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  mapped_ = (bytes + 63) / 64 * 64;
  data_ = std::aligned_alloc(64, mapped_);
  if (!data_) {
    size_ = mapped_ = 0;
    out_of_memory(bytes);
  }
  std::memset(data_, 0, mapped_);
}
HugeBuffer::~HugeBuffer() { std::free(data_); }

#endif

}  // namespace octomoe::cpu
