#include "cuda/workspace.h"

#include <gtest/gtest.h>

#include <random>

namespace octomoe::cuda {
namespace {

TEST(WorkspacePlan, BuffersThatLiveTogetherAreApart) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    struct Want {
      std::int64_t bytes;
      int first, last, index;
    };
    std::vector<Want> all;
    WorkspacePlan plan;
    for (int i = 0; i < 12; ++i) {
      const int first = static_cast<int>(random() % 8), last = first + static_cast<int>(random() % 4);
      const auto bytes = static_cast<std::int64_t>(random() % 100000);
      all.push_back({bytes, first, last, plan.add(bytes, first, last)});
    }
    plan.place();
    ASSERT_GE(plan.bytes(), plan.live_bytes());
    for (const Want& a : all) {
      ASSERT_EQ(plan.offset(a.index) % 256, 0u);
      ASSERT_LE(plan.offset(a.index) + static_cast<std::size_t>(a.bytes), plan.bytes());
      for (const Want& b : all) {
        if (a.index == b.index || a.last < b.first || b.last < a.first || a.bytes == 0 || b.bytes == 0) continue;
        const auto a_begin = plan.offset(a.index), b_begin = plan.offset(b.index);
        ASSERT_TRUE(a_begin + static_cast<std::size_t>(a.bytes) <= b_begin ||
                    b_begin + static_cast<std::size_t>(b.bytes) <= a_begin);
      }
    }
  }
}

TEST(WorkspacePlan, MemoryIsUsedAgain) {
  WorkspacePlan plan;
  const int a = plan.add(1000, 0, 1), b = plan.add(1000, 2, 3);
  plan.place();
  EXPECT_EQ(plan.offset(a), plan.offset(b));
  EXPECT_EQ(plan.bytes(), 1024u);
}

}  // namespace
}  // namespace octomoe::cuda
