// compile: one catalogue entry to a cubin (or PTX) with NVRTC, on any machine, GPU or not.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "jit/catalogue.h"
#include "jit/key.h"
#include "jit/report.h"
#include "jit/sources.h"
#include "jit/target.h"

namespace octomoe::jit {

struct CompiledKernel {
  std::string id;
  Target target;
  Key source_key;
  int nvrtc_version = 0;  // 13020 is 13.2
  ResourceReport report;
  std::vector<std::byte> image;  // cubin, or PTX text with its final NUL
};

// Error(cuda) with the first error line of NVRTC's log and the entry's id, Error(unsupported) without NVRTC or if it
// does not know the architecture. Thread-safe.
CompiledKernel compile(const KernelEntry& entry, Target target, const SourceSet& sources = SourceSet::embedded());

// A compiled kernel as one run of bytes, and back. decode checks every length; Error(format) says what is wrong.
std::vector<std::byte> encode(const CompiledKernel& kernel);
CompiledKernel decode(std::span<const std::byte> bytes, const std::string& name);

}  // namespace octomoe::jit
