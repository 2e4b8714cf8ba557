#include "jit/compile.h"

#include "cuda/nvrtc.h"
#include "jit/bytes.h"
#include "tensor/check.h"

namespace octomoe::jit {

CompiledKernel compile(const KernelEntry& entry, Target target, const SourceSet& sources) {
  const cuda::Nvrtc& nvrtc = cuda::Nvrtc::get();
  if (!nvrtc.supports(target.arch)) {
    fail(ErrorCode::unsupported, "kernel {}: NVRTC {}.{} ({}) does not know {}", entry.id, nvrtc.version() / 1000,
         nvrtc.version() % 1000 / 10, nvrtc.path(), to_string(target));
  }
  Translation t = translate(entry, target, sources);
  cuda::NvrtcProgram program{.source = t.source, .name = "octomoe_kernel.cu", .options = t.options, .ptx = target.ptx};
  for (const auto* header : t.headers) program.headers.emplace_back(header->first, header->second);
  cuda::NvrtcResult result = nvrtc.compile(program);
  if (!result.ok) {
    const std::string line = first_error(result.log);
    fail(ErrorCode::cuda, "kernel {} for {} does not compile: {}{}{}", entry.id, to_string(target), result.failure,
         line.empty() ? "" : ": ", line);
  }
  return {.id = entry.id,
          .target = target,
          .source_key = source_key(t),
          .nvrtc_version = nvrtc.version(),
          .report = parse_report(result.log),
          .image = std::move(result.image)};
}

std::vector<std::byte> encode(const CompiledKernel& k) {
  ByteWriter out;
  out.put_text(k.id);
  out.put(static_cast<std::int32_t>(k.target.arch));
  out.put(static_cast<std::int32_t>(k.target.ptx));
  out.put(k.source_key.bytes);
  out.put(static_cast<std::int32_t>(k.nvrtc_version));
  const ResourceReport& r = k.report;
  for (const int value : {r.registers, r.stack_bytes, r.spill_store_bytes, r.spill_load_bytes, r.static_shared_bytes,
                          r.tensor_instructions}) {
    out.put(static_cast<std::int32_t>(value));
  }
  out.put(static_cast<std::uint32_t>(r.warnings.size()));
  for (const std::string& w : r.warnings) out.put_text(w);
  out.put(static_cast<std::uint64_t>(k.image.size()));
  out.put_bytes(k.image);
  return out.take();
}

CompiledKernel decode(std::span<const std::byte> bytes, const std::string& name) {
  ByteReader in(bytes, name);
  CompiledKernel k;
  k.id = in.get_text();
  k.target.arch = in.get<std::int32_t>();
  const auto ptx = in.get<std::int32_t>();
  if (ptx != 0 && ptx != 1) fail(ErrorCode::format, "{}: expected 0 or 1 as the kind of image, got {}", name, ptx);
  k.target.ptx = ptx == 1;
  k.source_key.bytes = in.get<std::array<std::uint8_t, 16>>();
  k.nvrtc_version = in.get<std::int32_t>();
  ResourceReport& r = k.report;
  for (int* value : {&r.registers, &r.stack_bytes, &r.spill_store_bytes, &r.spill_load_bytes, &r.static_shared_bytes,
                     &r.tensor_instructions}) {
    *value = in.get<std::int32_t>();
  }
  const auto warnings = in.get<std::uint32_t>();
  for (std::uint32_t i = 0; i < warnings; ++i) r.warnings.push_back(in.get_text());
  const auto image = in.get_bytes(in.get<std::uint64_t>());
  k.image.assign(image.begin(), image.end());
  if (in.left() > 0) fail(ErrorCode::format, "{}: {} bytes too many", name, in.left());
  if (k.image.empty()) fail(ErrorCode::format, "{}: no image", name);
  return k;
}

}  // namespace octomoe::jit
