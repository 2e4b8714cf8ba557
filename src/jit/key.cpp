#include "jit/key.h"

#define XXH_INLINE_ALL
#include <fmt/format.h>
#include <xxhash.h>

#include <memory>

#include "tensor/check.h"

namespace octomoe::jit {
namespace {

Key canonical(XXH128_hash_t h) {
  XXH128_canonical_t c;
  XXH128_canonicalFromHash(&c, h);
  Key key;
  std::copy(std::begin(c.digest), std::end(c.digest), key.bytes.begin());
  return key;
}

// Every part goes in with its length, so that no two lists of parts read alike.
class Hasher {
 public:
  Hasher() : state_(XXH3_createState()) {
    if (!state_) fail(ErrorCode::out_of_memory, "out of memory");
    XXH3_128bits_reset(state_.get());
  }
  void add(std::string_view part) {
    const std::uint64_t n = part.size();
    std::uint8_t length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<std::uint8_t>(n >> (8 * i));
    XXH3_128bits_update(state_.get(), length, sizeof(length));
    XXH3_128bits_update(state_.get(), part.data(), part.size());
  }
  Key key() const { return canonical(XXH3_128bits_digest(state_.get())); }

 private:
  struct Free {
    void operator()(XXH3_state_t* s) const { XXH3_freeState(s); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

constexpr const char* kKeyVersion = "octomoe kernel key 1";

}  // namespace

std::string to_string(const Key& key) {
  std::string out;
  for (const std::uint8_t b : key.bytes) out += fmt::format("{:02x}", b);
  return out;
}

Key hash(std::span<const std::byte> bytes) { return canonical(XXH3_128bits(bytes.data(), bytes.size())); }

Translation translate(const KernelEntry& e, Target target, const SourceSet& sources) {
  Translation t;
  t.headers = sources.closure(e.header);
  const std::string bounds = e.max_registers > 0 ? fmt::format("__maxnreg__({})", e.max_registers)
                                                 : fmt::format("__launch_bounds__({}, {})", e.threads, e.min_blocks);
  t.source = fmt::format(
      "#include \"{}\"\n"
      "extern \"C\" __global__ void {} {}(const __grid_constant__ {} args) {{\n"
      "  {}(args);\n"
      "}}\n",
      e.header, bounds, kKernelName, e.args_type, e.call);
  t.options = {
      "--gpu-architecture=" + to_string(target),
      "--std=c++20",
      "--fmad=false",  // docs/schemes.md says where a multiply and an add are one operation
      "-default-device",
      "-DNDEBUG",  // device asserts serialise wgmma (ptxas C7510)
  };
  if (!target.ptx) t.options.emplace_back("--ptxas-options=-v");
  return t;
}

Key source_key(const Translation& t) {
  Hasher h;
  h.add(kKeyVersion);
  h.add(t.source);
  for (const std::string& option : t.options) h.add(option);
  h.add("");
  for (const auto* header : t.headers) {
    h.add(header->first);
    h.add(header->second);
  }
  return h.key();
}

Key cache_key(const Key& source, int nvrtc_version) {
  Hasher h;
  h.add(to_string(source));
  h.add(std::to_string(nvrtc_version));
  return h.key();
}

}  // namespace octomoe::jit
