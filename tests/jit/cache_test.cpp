#include "jit/cache.h"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "jit/support.h"

namespace octomoe::jit {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::LogCatcher;
using ::testing::SizeIs;
using testing::TempFolder;
using Bytes = std::vector<std::byte>;

Bytes bytes_of(const std::string& text) {
  const auto s = std::as_bytes(std::span(text));
  return {s.begin(), s.end()};
}
Key key_of(const std::string& text) { return hash(bytes_of(text)); }
// What a key stands for: large enough that writing it is not one step.
Bytes content_of(const std::string& name) {
  Bytes out;
  const Bytes part = bytes_of(name + ", ");
  while (out.size() < 300'000) out.insert(out.end(), part.begin(), part.end());
  return out;
}
std::vector<std::string> leftovers(const TempFolder& folder) {
  std::vector<std::string> out;
  for (const std::string& name : folder.files()) {
    if (!name.ends_with(".kernel")) out.push_back(name);
  }
  return out;
}

TEST(DiskCache, StoresAndFinds) {
  TempFolder folder;
  int made = 0;
  const auto make = [&] { return ++made, bytes_of("image"); };
  {
    DiskCache cache(folder.path("a/b"));
    EXPECT_FALSE(std::filesystem::exists(folder.path("a")));
    EXPECT_EQ(cache.load(key_of("k")), std::nullopt);
    EXPECT_EQ(cache.load_or_make(key_of("k"), make), bytes_of("image"));
    EXPECT_EQ(cache.load_or_make(key_of("k"), make), bytes_of("image"));
  }
  DiskCache next(folder.path("a/b"));
  EXPECT_EQ(next.load_or_make(key_of("k"), make), bytes_of("image"));
  EXPECT_EQ(next.load(key_of("k")), bytes_of("image"));
  EXPECT_EQ(made, 1);
  EXPECT_EQ(next.load_or_make(key_of("other"), make), bytes_of("image"));
  EXPECT_EQ(made, 2);
  DiskCache view(folder.path("a/b"));
  EXPECT_EQ(std::filesystem::path(view.file_of(key_of("k"))).filename(), to_string(key_of("k")) + ".kernel");
}

TEST(DiskCache, FailuresOfMakeStoreNothing) {
  TempFolder folder;
  DiskCache cache(folder.path());
  EXPECT_THROW(cache.load_or_make(key_of("k"), []() -> Bytes { throw std::runtime_error("no"); }), std::runtime_error);
  EXPECT_THAT(folder.files(), IsEmpty());
  EXPECT_EQ(cache.load_or_make(key_of("k"), [] { return bytes_of("x"); }), bytes_of("x"));
}

TEST(DiskCache, DamagedEntriesAreMadeAgain) {
  TempFolder folder;
  const Key key = key_of("k");
  DiskCache cache(folder.path());
  cache.load_or_make(key, [] { return bytes_of("image of some length"); });
  const std::string good = testing::read_file(cache.file_of(key));
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const bool cut : {false, true}) {
      std::string bad = cut ? good.substr(0, i) : good;
      if (!cut) bad[i] = static_cast<char>(bad[i] ^ 4);
      testing::write_file(cache.file_of(key), bad);
      LogCatcher log;
      EXPECT_EQ(cache.load(key), std::nullopt);
      EXPECT_THAT(log.infos(), ElementsAre(HasSubstr("is damaged")));
      int made = 0;
      EXPECT_EQ(cache.load_or_make(key, [&] { return ++made, bytes_of("image of some length"); }),
                bytes_of("image of some length"));
      EXPECT_EQ(made, 1);
      EXPECT_EQ(testing::read_file(cache.file_of(key)), good);
    }
  }
  EXPECT_THAT(leftovers(folder), IsEmpty());
}

TEST(DiskCache, UnacceptedEntriesAreMadeAgain) {
  TempFolder folder;
  DiskCache cache(folder.path());
  cache.load_or_make(key_of("k"), [] { return bytes_of("old"); });
  const auto accept = [](std::span<const std::byte> b) { return b.size() > 3; };
  EXPECT_EQ(cache.load_or_make(
                key_of("k"), [] { return bytes_of("newer"); }, accept),
            bytes_of("newer"));
  EXPECT_EQ(cache.load(key_of("k")), bytes_of("newer"));
}

TEST(DiskCache, OneThreadMakes) {
  TempFolder folder;
  DiskCache cache(folder.path());
  std::atomic<int> made = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 16; ++i) {
    threads.emplace_back([&] {
      const Bytes b = cache.load_or_make(key_of("k"), [&] {
        ++made;
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        return content_of("k");
      });
      EXPECT_EQ(b, content_of("k"));
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(made, 1);
  EXPECT_THAT(folder.files(), SizeIs(1));
}

// Children that ask for `keys` keys each and leave one letter per make in a file.
void ask_as_processes(const TempFolder& folder, const std::string& tally, int processes, int keys) {
  std::vector<pid_t> children;
  for (int p = 0; p < processes; ++p) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      bool good = true;
      try {
        DiskCache cache(folder.path("cache"));
        for (int i = 0; i < keys; ++i) {
          const std::string name = std::to_string((i + p) % keys);
          const Bytes b = cache.load_or_make(key_of(name), [&] {
            std::ofstream(tally, std::ios::app) << "x";
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
            return content_of(name);
          });
          good = good && b == content_of(name);
        }
      } catch (...) {
        good = false;
      }
      ::_exit(good ? 0 : 1);
    }
    children.push_back(pid);
  }
  for (const pid_t pid : children) {
    int status = 0;
    ::waitpid(pid, &status, 0);
    EXPECT_EQ(status, 0);
  }
}

TEST(DiskCache, OneProcessMakes) {
  TempFolder folder;
  ask_as_processes(folder, folder.path("tally"), 8, 6);
  EXPECT_EQ(testing::read_file(folder.path("tally")), std::string(6, 'x'));
}

TEST(DiskCache, KilledProcessesLeaveAGoodCache) {
  TempFolder folder;
  std::filesystem::create_directory(folder.path("cache"));
  for (int round = 0; round < 60; ++round) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      DiskCache cache(folder.path("cache"));
      for (int i = 0;; ++i) {
        const std::string name = std::to_string(i % 5);
        cache.load_or_make(key_of(name), [&] { return content_of(name); });
        if (i % 5 == 4) {
          for (int k = 0; k < 5; ++k) ::unlink(cache.file_of(key_of(std::to_string(k))).c_str());
        }
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(500 + 337 * round));
    ::kill(pid, SIGKILL);
    int status = 0;
    ::waitpid(pid, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));
    // Whatever it left: everything that has an entry's name is whole, and nothing waits for the dead.
    LogCatcher log;
    DiskCache cache(folder.path("cache"));
    for (int k = 0; k < 5; ++k) {
      const std::string name = std::to_string(k);
      const auto found = cache.load(key_of(name));
      EXPECT_EQ(found.value_or(content_of(name)), content_of(name));
    }
    EXPECT_EQ(cache.load_or_make(key_of("0"), [] { return content_of("0"); }), content_of("0"));
    EXPECT_THAT(log.infos(), IsEmpty());
    EXPECT_THAT(log.warnings(), IsEmpty());
  }
}

TEST(DiskCache, OldTemporaryFilesAreRemoved) {
  TempFolder folder;
  const std::string old = folder.path("abc.kernel.tmp-1-2-3"), fresh = folder.path("abd.kernel.tmp-1-2-3");
  testing::write_file(old, "x");
  testing::write_file(fresh, "x");
  std::filesystem::last_write_time(old, std::filesystem::file_time_type::clock::now() - std::chrono::hours(2));
  DiskCache cache(folder.path());
  cache.load_or_make(key_of("k"), [] { return bytes_of("x"); });
  EXPECT_FALSE(std::filesystem::exists(old));
  EXPECT_TRUE(std::filesystem::exists(fresh));
}

// ---- folders that cannot be used: served from memory, one warning ----

void expect_served_with_one_warning(const std::string& folder, const std::string& reason) {
  LogCatcher log;
  DiskCache cache(folder);
  for (const char* name : {"a", "b", "a"}) {
    EXPECT_EQ(cache.load_or_make(key_of(name), [&] { return content_of(name); }), content_of(name));
  }
  ASSERT_THAT(log.warnings(), SizeIs(1));
  EXPECT_THAT(log.warnings()[0], HasSubstr(reason));
}

TEST(DiskCache, MissingFolder) {
  expect_served_with_one_warning("", "no folder");
  expect_served_with_one_warning("/proc/no/such/folder", "cannot be created");
  TempFolder folder;
  testing::write_file(folder.path("file"), "");
  expect_served_with_one_warning(folder.path("file"), "cannot be");
  expect_served_with_one_warning(folder.path("file/below"), "cannot be created");
}

// In a child, as a user without root's rights; the parent's checks are what the child's exit code says.
template <class Fn>
int as_nobody(const Fn& fn) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    if (::geteuid() == 0 && (::setgid(65534) != 0 || ::setuid(65534) != 0)) ::_exit(77);
    fn();
    ::_exit(::testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(DiskCache, ReadOnlyFolder) {
  TempFolder folder;
  DiskCache(folder.path()).load_or_make(key_of("stored"), [] { return content_of("stored"); });
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0555));
  const int code = as_nobody([&] {
    LogCatcher quiet;
    DiskCache cache(folder.path());
    EXPECT_EQ(cache.load_or_make(key_of("stored"), [] { return Bytes(); }), content_of("stored"));
    EXPECT_THAT(quiet.warnings(), IsEmpty());
    expect_served_with_one_warning(folder.path(), "cannot be written");
  });
  if (code == 77) GTEST_SKIP() << "cannot give up root's rights here";
  EXPECT_EQ(code, 0);
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0755));
  EXPECT_THAT(folder.files(), SizeIs(1));
}

TEST(DiskCache, FullDisk) {
  TempFolder folder;
  // A limit on the size of files fails like a full disk, in the middle of a write.
  const pid_t pid = ::fork();
  if (pid == 0) {
    const rlimit limit{4096, 4096};
    ::signal(SIGXFSZ, SIG_IGN);
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) ::_exit(77);
    expect_served_with_one_warning(folder.path(), "cannot write");
    ::_exit(::testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_THAT(folder.files(), IsEmpty());
}

TEST(DiskCache, DefaultFolderFollowsTheEnvironment) {
  const auto with = [](const char* own, const char* xdg, const char* home) {
    const auto set = [](const char* name, const char* value) { value ? ::setenv(name, value, 1) : ::unsetenv(name); };
    const std::string old = std::getenv("HOME") ? std::getenv("HOME") : "";
    set("OCTOMOE_CACHE_DIR", own);
    set("XDG_CACHE_HOME", xdg);
    set("HOME", home);
    const std::string folder = DiskCache::default_folder();
    set("OCTOMOE_CACHE_DIR", nullptr);
    set("XDG_CACHE_HOME", nullptr);
    set("HOME", old.c_str());
    return folder;
  };
  EXPECT_EQ(with("/a", "/b", "/c"), "/a");
  EXPECT_EQ(with(nullptr, "/b", "/c"), "/b/octomoe");
  EXPECT_EQ(with("", "relative", "/c"), "/c/.cache/octomoe");
  EXPECT_EQ(with(nullptr, nullptr, nullptr), "");
}

}  // namespace
}  // namespace octomoe::jit
