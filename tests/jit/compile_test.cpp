#include "jit/compile.h"

#include <gmock/gmock.h>

#include <cstring>
#include <thread>

#include "core/few_args.h"
#include "jit/key.h"
#include "jit/pack_build.h"
#include "jit/sass.h"
#include "jit/support.h"
#include "plan/catalogue.h"
#include "support/errors.h"

namespace octomoe::jit {
namespace {

using octomoe::testing::expect_error;
using ::testing::HasSubstr;
using testing::small_entry;
using testing::small_sources;

Key key_of(const KernelEntry& entry, const SourceSet& sources, Target target = 80) {
  return source_key(translate(entry, target, sources));
}

TEST(Key, IsStable) {
  // Nothing of this machine is in it: it changes only together with kKeyVersion, the wrapper or the options.
  EXPECT_EQ(to_string(key_of(small_entry(), small_sources())), to_string(key_of(small_entry(), small_sources())));
  EXPECT_EQ(to_string(hash({})), "99aa06d3014798d86001c324468d497f");  // XXH128 of nothing
}

TEST(Key, SeesEveryIncludedFileAndNoOther) {
  const Key before = key_of(small_entry(), small_sources());
  SourceSet s = small_sources();
  s.set("core/unused.h", "int x;");
  EXPECT_EQ(key_of(small_entry(), s), before);
  s.set("core/base.h", *s.find("core/base.h") + "\n");
  EXPECT_NE(key_of(small_entry(), s), before);
  s = small_sources();
  s.set("demo.cuh", *s.find("demo.cuh") + "#include \"core/unused.h\"\n");
  const Key with_unused = key_of(small_entry(), s);
  s.set("core/unused.h", "int x;");
  EXPECT_NE(key_of(small_entry(), s), with_unused);
}

TEST(Key, SeesWhatIsCompiledAndNotWhatItIsCalled) {
  const SourceSet s = small_sources();
  const Key before = key_of(small_entry(), s);
  KernelEntry e = small_entry();
  e.id = "renamed";
  e.shared_bytes = 1024;
  EXPECT_EQ(key_of(e, s), before);
  EXPECT_NE(key_of(small_entry("demo::scale<3>"), s), before);
  e.threads = 256;
  EXPECT_NE(key_of(e, s), before);
  EXPECT_NE(key_of(small_entry(), s, 86), before);
  EXPECT_NE(key_of(small_entry(), s, Target(80, true)), before);
  EXPECT_NE(cache_key(before, 13000), cache_key(before, 12090));
  EXPECT_NE(cache_key(before, 13000), before);
}

TEST(Encode, RoundTrip) {
  const CompiledKernel k = testing::made_up_kernel("a:b", 90, 1000);
  const std::vector<std::byte> bytes = encode(k);
  const CompiledKernel back = decode(bytes, "x");
  EXPECT_EQ(back.id, k.id);
  EXPECT_EQ(back.target, k.target);
  EXPECT_EQ(back.source_key, k.source_key);
  EXPECT_EQ(back.nvrtc_version, k.nvrtc_version);
  EXPECT_EQ(back.report, k.report);
  EXPECT_EQ(back.image, k.image);
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    expect_error(ErrorCode::format, "x: ", [&] { decode(std::span(bytes).first(n), "x"); });
  }
  std::vector<std::byte> longer = bytes;
  longer.push_back(std::byte{0});
  expect_error(ErrorCode::format, "1 bytes too many", [&] { decode(longer, "x"); });
}

TEST(Compile, MakesCubinsForEveryArchitecture) {
  OCTOMOE_NEED_NVRTC();
  const SourceSet sources = small_sources();
  for (const int arch : {80, 86, 89, 90}) {
    const CompiledKernel k = compile(small_entry(), arch, sources);
    ASSERT_GT(k.image.size(), 100u);
    EXPECT_EQ(std::memcmp(k.image.data(),
                          "\x7f"
                          "ELF",
                          4),
              0);
    EXPECT_GT(k.report.registers, 0) << arch;
    EXPECT_EQ(k.report.stack_bytes, 0);
    EXPECT_THAT(faults(k.report, ""), ::testing::IsEmpty());
    EXPECT_EQ(k.nvrtc_version, cuda::Nvrtc::get().version());
    EXPECT_EQ(k.source_key, key_of(small_entry(), sources, arch));
  }
}

TEST(Compile, MakesPtxForDevicesToCome) {
  OCTOMOE_NEED_NVRTC();
  const CompiledKernel k = compile(small_entry(), Target(kPtxArch, true), small_sources());
  const std::string text(reinterpret_cast<const char*>(k.image.data()), k.image.size());
  EXPECT_THAT(text, HasSubstr(".target sm_90"));
  EXPECT_THAT(text, HasSubstr(kKernelName));
  EXPECT_EQ(text.back(), '\0');  // as the driver wants it
  EXPECT_EQ(k.report.registers, -1);
}

TEST(Compile, ReportsLocalAndSharedMemory) {
  OCTOMOE_NEED_NVRTC();
  const CompiledKernel k = compile(small_entry("demo::local<64>"), 80, small_sources());
  EXPECT_EQ(k.report.stack_bytes, 256);
  EXPECT_THAT(faults(k.report, ""), ::testing::ElementsAre("uses 256 bytes of local memory"));
  EXPECT_EQ(compile(small_entry("demo::shared<128>"), 80, small_sources()).report.static_shared_bytes, 512);
}

TEST(Compile, FailuresNameKernelFileAndLine) {
  OCTOMOE_NEED_NVRTC();
  SourceSet s = small_sources();
  s.set("core/base.h",
        "#pragma once\nnamespace demo { using u32 = unsigned int; inline constexpr int kAdd = nonsense; }\n");
  expect_error(ErrorCode::cuda, "core/base.h(2): error: identifier \"nonsense\" is undefined",
               [&] { compile(small_entry(), 80, s); });
  expect_error(ErrorCode::cuda, "kernel demo:scale<2> for sm_90a does not compile",
               [&] { compile(small_entry(), 90, s); });
  // ptxas's complaints count too: wgmma is not in sm_80.
  s = small_sources();
  s.set("demo.cuh",
        "namespace demo { struct Args {}; template <int> __device__ void scale(const Args&) "
        "{ asm volatile(\"wgmma.fence.sync.aligned;\"); } }");
  expect_error(ErrorCode::cuda, "wgmma", [&] { compile(small_entry(), 80, s); });
  EXPECT_NO_THROW(compile(small_entry(), 90, s));
}

TEST(Compile, UnknownArchitecture) {
  OCTOMOE_NEED_NVRTC();
  expect_error(ErrorCode::unsupported, "does not know sm_999", [] { compile(small_entry(), 999, small_sources()); });
}

// One CTA of either kernel for few tokens fits on a multiprocessor of SM90, and not two of gate_up (core/few_args.h):
// it has four register files of 16384, and threads get registers in eights.
TEST(Compile, FewTokensShareAMultiprocessor) {
  OCTOMOE_NEED_NVRTC();
  for (const kernels::Promotion p :
       {kernels::Promotion::channel, kernels::Promotion::block, kernels::Promotion::hybrid}) {
    const auto of_a_file = [&](const std::string& id) {
      const KernelEntry& entry = plan::entry(id);
      return (compile(entry, 90).report.registers + 7) / 8 * 8 * (entry.threads / 4);
    };
    const int gate_up = of_a_file(plan::few_gate_up_id(p));
    EXPECT_GT(2 * gate_up, 16384) << static_cast<int>(p);
    for (const int k : {512, 2048}) {
      EXPECT_LE(gate_up + of_a_file(plan::few_down_id(p, kernels::few_column_lanes(p, k))), 16384)
          << static_cast<int>(p) << ' ' << k;
    }
  }
  EXPECT_GT(2 * kernels::kFewDownMinSharedBytes, 228 * 1024);
}

TEST(Compile, FromManyThreads) {
  OCTOMOE_NEED_NVRTC();
  const SourceSet sources = small_sources();
  const CompiledKernel one = compile(small_entry(), 80, sources);
  std::vector<CompiledKernel> got(6);
  std::vector<std::thread> threads;
  for (CompiledKernel& k : got) threads.emplace_back([&] { k = compile(small_entry(), 80, sources); });
  for (std::thread& t : threads) t.join();
  for (const CompiledKernel& k : got) EXPECT_EQ(k.image, one.image);
}

TEST(Sass, FindsTensorInstructions) {
  OCTOMOE_NEED_NVRTC();
  const std::string tool = find_disassembler();
  if (tool.empty()) GTEST_SKIP() << "no nvdisasm or cuobjdump here";
  for (const int arch : {80, 90}) {
    const CompiledKernel k = compile(small_entry("demo::tensor<3>"), arch, small_sources());
    EXPECT_EQ(count_mnemonic(disassemble(k.image, tool), "IMMA"), 3) << tool;
    const CompiledKernel none = compile(small_entry(), arch, small_sources());
    EXPECT_EQ(count_mnemonic(disassemble(none.image, tool), "IMMA"), 0);
  }
  if (const std::string other = cuda::find_tool("cuobjdump"); !other.empty()) {
    const CompiledKernel k = compile(small_entry("demo::tensor<3>"), 80, small_sources());
    EXPECT_EQ(count_mnemonic(disassemble(k.image, other), "IMMA"), 3);
  }
  const std::vector<std::byte> junk(100);
  expect_error(ErrorCode::io, "failed", [&] { disassemble(junk, tool); });
  expect_error(ErrorCode::io, "/nonexistent/nvdisasm failed", [&] { disassemble(junk, "/nonexistent/nvdisasm"); });
}

TEST(PackJobs, PicksWhatEachTargetCanRun) {
  std::vector<KernelEntry> entries = {small_entry(), small_entry("demo::scale<3>")};
  entries[1].archs = {90};
  const Target all[] = {80, 90, Target(90, true)};
  const auto jobs = pack_jobs(entries, all);
  ASSERT_EQ(jobs.size(), 4u);  // 80: one; 90: two; PTX: the portable one
  EXPECT_EQ(jobs[3].first->id, entries[0].id);
  const Target none[] = {89};
  entries.erase(entries.begin());
  expect_error("arch: expected one that a kernel is made for, got sm_89", [&] { pack_jobs(entries, none); });
}

TEST(PackBuild, CompilesCountsAndReportsFailures) {
  OCTOMOE_NEED_NVRTC();
  const SourceSet sources = small_sources();
  std::vector<KernelEntry> entries = {small_entry(), small_entry("demo::tensor<2>"), small_entry("demo::missing<2>")};
  PackBuildOptions options{.targets = {80, 90}, .jobs = 2, .disassembler = find_disassembler(), .sources = &sources};
  std::size_t last = 0;
  options.progress = [&](std::size_t done, std::size_t total, const std::string&) {
    EXPECT_EQ(done, ++last);
    EXPECT_EQ(total, 6u);
  };
  const PackBuild b = build_pack(entries, options);
  EXPECT_EQ(last, 6u);
  ASSERT_EQ(b.failures.size(), 2u);
  EXPECT_THAT(b.failures[0], HasSubstr("demo:missing<2> for sm_80 does not compile"));
  ASSERT_EQ(b.items.size(), 4u);
  for (const PackItem& item : b.items) {
    const bool counted = !options.disassembler.empty() && item.entry.expect == "IMMA";
    EXPECT_EQ(item.kernel.report.tensor_instructions, counted ? 2 : -1);
  }
  EXPECT_GT(b.slowest_s, 0);
  EXPECT_EQ(b.reused, 0u);

  // A second time only what has changed is compiled.
  const std::vector<std::byte> bytes = make_pack(b.items);
  options.reuse = Pack::parse(bytes, "old");
  options.progress = {};
  entries.pop_back();
  const PackBuild again = build_pack(entries, options);
  EXPECT_EQ(again.reused, 4u);
  EXPECT_EQ(make_pack(again.items), bytes);
  entries[0].threads = 64;
  EXPECT_EQ(build_pack(entries, options).reused, 2u);
}

}  // namespace
}  // namespace octomoe::jit
