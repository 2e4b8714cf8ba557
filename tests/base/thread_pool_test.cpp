#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

namespace octomoe {
namespace {

TEST(ThreadPool, RunsEveryIndexOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const std::int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> hits(static_cast<std::size_t>(count));
      std::atomic<bool> in_range{true};
      pool.parallel_for(count, [&](std::int64_t i, int t) {
        ++hits[static_cast<std::size_t>(i)];
        if (t < 0 || t >= threads) in_range = false;
      });
      for (const auto& h : hits) EXPECT_EQ(h.load(), 1);
      EXPECT_TRUE(in_range);
    }
  }
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  ThreadPool pool(3);
  EXPECT_THROW(pool.parallel_for(100,
                                 [](std::int64_t i, int) {
                                   if (i == 40) throw std::runtime_error("forty");
                                 }),
               std::runtime_error);
  std::atomic<int> n{0};
  pool.parallel_for(10, [&](std::int64_t, int) { ++n; });
  EXPECT_EQ(n, 10);
}

TEST(ThreadPool, NestedLoopsRunInline) {
  ThreadPool pool(2);
  std::atomic<int> n{0};
  pool.parallel_for(4, [&](std::int64_t, int) { pool.parallel_for(5, [&](std::int64_t, int) { ++n; }); });
  EXPECT_EQ(n, 20);
}

TEST(ThreadPool, SeveralCallersAtOnce) {
  ThreadPool pool(2);
  std::atomic<int> n{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int r = 0; r < 50; ++r) pool.parallel_for(7, [&](std::int64_t, int) { ++n; });
    });
  }
  for (auto& c : callers) c.join();
  EXPECT_EQ(n, 4 * 50 * 7);
}

TEST(ThreadPool, WorksInAForkedChild) {
  ThreadPool pool(2);
  pool.parallel_for(8, [](std::int64_t, int) {});
  const pid_t child = fork();
  if (child == 0) {
    int n = 0;
    pool.parallel_for(8, [&](std::int64_t, int) { ++n; });
    _exit(n == 8 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace octomoe
