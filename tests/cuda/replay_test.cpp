#include "cuda/replay.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cuda/launch_list.h"

namespace octomoe::cuda {
namespace {

TEST(Recent, KeepsTheLatestKinds) {
  Recent<int> recent(3);
  const auto find = [&](std::int64_t tokens) -> int& { return recent.find({tokens, 2, nullptr}); };
  EXPECT_TRUE(recent.enabled());
  for (const int tokens : {1, 2, 3}) find(tokens) = tokens;
  EXPECT_EQ(find(1), 1);
  EXPECT_EQ(find(4), 0);  // in the place of 2
  EXPECT_EQ(recent.size(), 3u);
  EXPECT_EQ(find(1), 1);
  EXPECT_EQ(find(3), 3);
  EXPECT_EQ(find(2), 0);
  EXPECT_EQ(find(4), 0);
  recent.disable();
  EXPECT_FALSE(recent.enabled());
  EXPECT_EQ(recent.size(), 0u);
  EXPECT_FALSE(Recent<int>(0).enabled());
}

TEST(Recent, TokensTopKAndStreamMakeAKind) {
  int stream = 0;
  Recent<int> recent(4);
  recent.find({1, 2, nullptr}) = 7;
  EXPECT_EQ(recent.find({3, 2, nullptr}), 0);
  EXPECT_EQ(recent.find({1, 3, nullptr}), 0);
  EXPECT_EQ(recent.find({1, 2, &stream}), 0);
  EXPECT_EQ(recent.find({1, 2, nullptr}), 7);
}

TEST(LaunchList, HoldsArguments) {
  LoadedKernel one, two;
  const double a = 1.5;
  const char b = 'b';
  LaunchList list;
  for (int round = 0; round < 2; ++round) {
    list.clear();
    list.add(one, {.grid = {3}}, &b, sizeof(b));
    list.add(two, {.grid = {0}}, &a, sizeof(a));  // an empty grid starts nothing
    list.add(two, {.grid = {4}, .threads = 64, .cluster = 2}, &a, sizeof(a));
    ASSERT_EQ(list.items().size(), 2u);
    EXPECT_EQ(*list.args(list.items()[0]), std::byte{'b'});
    EXPECT_EQ(std::memcmp(list.args(list.items()[1]), &a, sizeof(a)), 0);
    EXPECT_EQ(list.items()[1].offset % alignof(double), 0u);
    EXPECT_EQ(list.items()[1].how.grid.x, 4u);
    EXPECT_EQ(list.items()[1].how.threads, 64);
    EXPECT_EQ(list.items()[1].how.cluster, 2u);
  }
  EXPECT_FALSE(list.items()[0].same_launch(list.items()[1]));
  EXPECT_TRUE(list.items()[1].same_launch(list.items()[1]));
}

}  // namespace
}  // namespace octomoe::cuda
