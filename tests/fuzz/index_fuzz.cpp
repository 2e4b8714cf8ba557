// How to build and run: targets.h.
#include "fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  octomoe::fuzz::index({data, size});
  return 0;
}
