// Pack files: only Error, however the bytes look; what opens can be read to the end. And the include parser on the same
// bytes taken as text.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>

#include "jit/compile.h"
#include "jit/pack.h"
#include "jit/report.h"
#include "jit/sources.h"
#include "octomoe/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace octomoe;
  const auto bytes = std::as_bytes(std::span(data, size));
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto guarded = [](const auto& fn) {
    try {
      fn();
    } catch (const Error& e) {
      if (e.code() != ErrorCode::format && e.code() != ErrorCode::internal) std::abort();
    }
  };
  guarded([&] {
    const auto pack = jit::Pack::parse(bytes, "pack");
    for (const jit::PackEntry& entry : pack->entries()) guarded([&] { pack->image(entry); });
  });
  guarded([&] { jit::decode(bytes, "entry"); });
  guarded([&] { jit::parse_includes(text, "file"); });
  jit::first_error(text);
  jit::parse_report(text);
  return 0;
}
