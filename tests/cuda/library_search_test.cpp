#include "cuda/library_search.h"

#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "jit/support.h"

namespace octomoe::cuda {
namespace {

using jit::testing::TempFolder;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

// The search remembers: each case has a process of its own.
template <class Fn>
void in_child(const Fn& fn) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    fn();
    ::_exit(::testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST(LibrarySearch, EachLibraryIsFoundOrSaysHowToGetIt) {
  in_child([] {
    for (const Library library : kLibraries) {
      const LibraryStatus& s = find_library(library);
      EXPECT_FALSE(s.name.empty());
      EXPECT_FALSE(s.fix.empty());
      EXPECT_FALSE(s.tried.empty());
      EXPECT_EQ(&find_library(library), &s);
      if (s.usable) {
        EXPECT_FALSE(s.version.empty());
        EXPECT_TRUE(s.path.starts_with("/")) << s.path;
        EXPECT_NE(s.handle, nullptr);
      } else {
        EXPECT_THAT(s.describe(), ::testing::AnyOf(HasSubstr("not found (tried"), HasSubstr("cannot be used")));
      }
    }
  });
}

TEST(LibrarySearch, FoldersInOrder) {
  in_child([] {
    TempFolder home, site;
    std::filesystem::create_directories(home.path("lib64"));
    std::filesystem::create_directories(site.path("nvidia/cuda_nvrtc/lib"));
    std::filesystem::create_directories(site.path("nvidia/cublas/lib"));
    ::setenv("CUDA_HOME", home.path().c_str(), 1);
    ::unsetenv("CUDA_PATH");
    add_python_paths({site.path(), "", "/no/such/folder", site.path()});
    const auto folders = library_folders();
    ASSERT_FALSE(folders.empty());
    EXPECT_EQ(folders[0], home.path("lib64"));
    EXPECT_THAT(folders, AllOf(Contains(site.path("nvidia/cuda_nvrtc/lib")), Contains(site.path("nvidia/cublas/lib"))));
  });
}

TEST(LibrarySearch, BrokenFilesAreReportedAndPassedOver) {
  in_child([] {
    TempFolder home;
    std::filesystem::create_directories(home.path("lib64"));
    jit::testing::write_file(home.path("lib64/libnvrtc.so.13"), "not a library");
    ::setenv("CUDA_HOME", home.path().c_str(), 1);
    const LibraryStatus& s = find_library(Library::nvrtc);
    EXPECT_EQ(s.tried[0], home.path("lib64/libnvrtc.so.13"));
    if (s.usable) {
      EXPECT_NE(s.path, s.tried[0]);
    } else if (!s.found) {
      EXPECT_THAT(s.describe(), HasSubstr("lib64/libnvrtc.so.13 cannot be used: "));
    }
  });
}

TEST(LibrarySearch, PathsAddedLaterAreSearched) {
  in_child([] {
    // A library that answers: the one of NCCL is asked for by name below a made-up environment.
    TempFolder site;
    ::unsetenv("CUDA_HOME");
    const LibraryStatus& before = find_library(Library::nccl);
    add_python_paths({site.path()});
    EXPECT_EQ(before.usable, &find_library(Library::nccl) == &before);  // found ones stay, others are searched again
  });
}

TEST(LibrarySearch, ToolsOnThePath) {
  in_child([] {
    TempFolder bin;
    jit::testing::write_file(bin.path("octomoe-no-tool"), "#!/bin/sh\n");
    ::setenv("PATH", (":" + bin.path() + ":/no/such").c_str(), 1);
    EXPECT_EQ(find_tool("octomoe-no-tool"), "");  // not executable
    std::filesystem::permissions(bin.path("octomoe-no-tool"), std::filesystem::perms(0755));
    EXPECT_EQ(find_tool("octomoe-no-tool"), bin.path("octomoe-no-tool"));
  });
}

}  // namespace
}  // namespace octomoe::cuda
