#include "jit/kernel_store.h"

#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "jit/support.h"
#include "octomoe/packs.h"
#include "support/errors.h"

namespace octomoe::jit {
namespace {

using octomoe::testing::expect_error;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::LogCatcher;
using ::testing::SizeIs;
using testing::small_entry;
using testing::small_sources;
using testing::TempFolder;

// A pack of an image that no compiler made, for entry and target.
std::shared_ptr<const Pack> pack_of(const KernelEntry& entry, Target target, const SourceSet& sources,
                                    const std::function<void(std::vector<std::byte>&)>& change = {}) {
  CompiledKernel k = testing::made_up_kernel(entry.id, target, 500);
  k.source_key = source_key(translate(entry, target, sources));
  const PackItem items[] = {{k, entry}};
  auto bytes = std::make_shared<std::vector<std::byte>>(make_pack(items));
  if (change) change(*bytes);
  return Pack::parse(*bytes, "test.pack", bytes);
}

TEST(KernelStore, TakesFromThePackFirst) {
  const SourceSet sources = small_sources();
  const KernelEntry entry = small_entry();
  KernelStore store({.sources = &sources, .packs = {pack_of(entry, 80, sources)}});
  const auto image = store.get(entry, 80);
  EXPECT_EQ(image->image.size(), 500u);
  EXPECT_EQ(store.get(entry, 80), image);  // once in a process
  EXPECT_EQ(store.get(entry, 86), image);  // an SM80 cubin runs on SM86
  EXPECT_EQ(store.counts().from_pack, 1);
}

TEST(KernelStore, PtxInAPackServesDevicesToCome) {
  const SourceSet sources = small_sources();
  KernelStore store({.sources = &sources, .packs = {pack_of(small_entry(), Target(kPtxArch, true), sources)}});
  EXPECT_TRUE(store.get(small_entry(), 120)->target.ptx);
}

TEST(KernelStore, AddedPacksComeFirst) {
  const SourceSet sources = small_sources();
  KernelStore store({.sources = &sources, .packs = {pack_of(small_entry(), 80, sources)}});
  CompiledKernel k = testing::made_up_kernel("x", 80, 77);
  k.source_key = source_key(translate(small_entry(), 80, sources));
  const PackItem items[] = {{k, small_entry()}};
  const auto bytes = std::make_shared<std::vector<std::byte>>(make_pack(items));
  store.add_pack(Pack::parse(*bytes, "second.pack", bytes));
  EXPECT_EQ(store.packs()[0]->name(), "second.pack");
  EXPECT_EQ(store.get(small_entry(), 80)->image.size(), 77u);
}

TEST(KernelStore, OldDevicesGetAClearError) {
  const SourceSet sources = small_sources();
  KernelStore store({.sources = &sources});
  expect_error(ErrorCode::unsupported, "compute capability 8.0 (Ampere) or newer, got 7.0",
               [&] { store.get(small_entry(), 70); });
}

TEST(KernelStore, CompilesThenFindsInTheCache) {
  OCTOMOE_NEED_NVRTC();
  TempFolder folder;
  const SourceSet sources = small_sources();
  {
    LogCatcher log;
    KernelStore store({.cache_folder = folder.path(), .sources = &sources});
    EXPECT_GT(store.get(small_entry(), 80)->report.registers, 0);
    EXPECT_EQ(store.counts().compiled, 1);
    EXPECT_THAT(log.infos(), ElementsAre(HasSubstr("compiled kernel demo:scale<2> for sm_80 in")));
  }
  EXPECT_THAT(folder.files(), SizeIs(1));
  KernelStore store({.cache_folder = folder.path(), .sources = &sources});
  EXPECT_GT(store.get(small_entry(), 80)->report.registers, 0);
  EXPECT_EQ(store.counts().from_cache, 1);
  EXPECT_EQ(store.counts().compiled, 0);
}

// A pack of other sources holds nothing for these: no stale kernel is ever used.
TEST(KernelStore, PacksOfOtherSourcesAreNotUsed) {
  OCTOMOE_NEED_NVRTC();
  SourceSet sources = small_sources();
  const auto pack = pack_of(small_entry(), 80, sources);
  sources.set("core/base.h", *sources.find("core/base.h") + "// changed\n");
  LogCatcher log;  // no cache folder: a warning that nobody needs here
  KernelStore store({.sources = &sources, .packs = {pack}});
  EXPECT_NE(store.get(small_entry(), 80)->image.size(), 500u);
  EXPECT_EQ(store.counts().compiled, 1);
}

TEST(KernelStore, DamagedPackEntriesAreCompiledWithOneWarning) {
  OCTOMOE_NEED_NVRTC();
  const SourceSet sources = small_sources();
  TempFolder folder;
  const auto pack = pack_of(small_entry(), 80, sources, [](std::vector<std::byte>& b) { b.back() ^= std::byte{1}; });
  LogCatcher log;
  KernelStore store({.cache_folder = folder.path(), .sources = &sources, .packs = {pack}});
  for (int i = 0; i < 3; ++i) EXPECT_GT(store.get(small_entry(), 80)->image.size(), 500u);
  ASSERT_THAT(log.warnings(), SizeIs(1));
  EXPECT_THAT(log.warnings()[0], HasSubstr("test.pack: kernel demo:scale<2> for sm_80 is damaged"));
}

TEST(KernelStore, NewerDevicesAreCompiledFor) {
  OCTOMOE_NEED_NVRTC();
  const SourceSet sources = small_sources();
  TempFolder folder;
  KernelStore store({.cache_folder = folder.path(), .sources = &sources});
  const auto& nvrtc = cuda::Nvrtc::get();
  const int newest = nvrtc.architectures().back();
  if (newest > 90) {
    EXPECT_EQ(store.get(small_entry(), newest)->target, Target(newest));
  }
  EXPECT_EQ(store.get(small_entry(), 250)->target, Target(kPtxArch, true));  // unknown to it: PTX
}

TEST(KernelStore, ForgetsFailures) {
  OCTOMOE_NEED_NVRTC();
  SourceSet sources = small_sources();
  TempFolder folder;
  KernelStore store({.cache_folder = folder.path(), .sources = &sources});
  const std::string good = *sources.find("core/base.h");
  sources.set("core/base.h", good + "bad");
  for (int i = 0; i < 2; ++i) {
    expect_error(ErrorCode::cuda, "does not compile", [&] { store.get(small_entry(), 80); });
  }
  sources.set("core/base.h", good);
  EXPECT_NO_THROW(store.get(small_entry(), 80));
}

TEST(KernelStore, OneCompileHoweverManyThreads) {
  OCTOMOE_NEED_NVRTC();
  const SourceSet sources = small_sources();
  TempFolder folder;
  KernelStore store({.cache_folder = folder.path(), .sources = &sources});
  std::vector<std::thread> threads;
  for (int i = 0; i < 12; ++i) {
    threads.emplace_back([&, i] { store.get(small_entry(i % 2 ? "demo::scale<2>" : "demo::scale<3>"), 80); });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(store.counts().compiled, 2);
}

TEST(KernelStore, OneCompileHoweverManyProcesses) {
  OCTOMOE_NEED_NVRTC();
  TempFolder folder;
  std::vector<pid_t> children;
  for (int i = 0; i < 6; ++i) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      int code = 100;
      try {
        const SourceSet sources = small_sources();
        KernelStore store({.cache_folder = folder.path(), .sources = &sources});
        store.get(small_entry("demo::scale<7>"), 80);
        code = store.counts().compiled;
      } catch (...) {
      }
      ::_exit(code);
    }
    children.push_back(pid);
  }
  int compiled = 0;
  for (const pid_t pid : children) {
    int status = 0;
    ::waitpid(pid, &status, 0);
    ASSERT_TRUE(WIFEXITED(status));
    compiled += WEXITSTATUS(status);
  }
  EXPECT_EQ(compiled, 1);
}

TEST(KernelStore, InstalledPackIsLookedForBesideTheLibrary) {
  const auto places = KernelStore::installed_packs();
  ASSERT_THAT(places, SizeIs(4));
  const std::string here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  EXPECT_EQ(places[0], here + "/share/octomoe/kernels.pack");
  EXPECT_THAT(places[1], HasSubstr("share/octomoe/kernels.pack"));
  EXPECT_EQ(places[3], here + "/kernels.pack");
}

// The process's own store reads the environment once, so each case has a process of its own.
template <class Fn>
void in_child(const std::string& pack, const Fn& fn) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::setenv("OCTOMOE_PACK", pack.c_str(), 1);
    fn();
    ::_exit(::testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST(PacksApi, NamedByTheEnvironment) {
  TempFolder folder;
  const auto bytes = make_pack({});
  for (const char* name : {"a.pack", "b.pack", "c.pack"}) {
    testing::write_file(folder.path(name), std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  in_child(folder.path("a.pack") + ":" + folder.path("b.pack"), [&] {
    EXPECT_THAT(kernel_packs(), ElementsAre(folder.path("a.pack"), folder.path("b.pack")));
    load_kernel_pack(folder.path("c.pack"));
    EXPECT_THAT(kernel_packs(), ElementsAre(folder.path("c.pack"), folder.path("a.pack"), folder.path("b.pack")));
    expect_error(ErrorCode::io, "none.pack", [&] { load_kernel_pack(folder.path("none.pack")); });
  });
  testing::write_file(folder.path("bad.pack"), "something else");
  in_child(folder.path("bad.pack"),
           [&] { expect_error(ErrorCode::format, "bad.pack: not a kernel pack", [] { kernel_packs(); }); });
}

}  // namespace
}  // namespace octomoe::jit
