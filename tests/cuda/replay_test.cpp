#include "cuda/replay.h"

#include <gtest/gtest.h>

namespace octomoe::cuda {
namespace {

CallKey key(std::int64_t tokens) {
  CallKey k{};
  k.tokens = tokens;
  return k;
}

TEST(Replays, KeepsTheLatestCalls) {
  Replays replays(3);
  EXPECT_TRUE(replays.enabled());
  for (const std::int64_t tokens : {1, 2, 3}) replays.find(key(tokens)).count = static_cast<int>(tokens);
  EXPECT_EQ(replays.find(key(1)).count, 1);
  EXPECT_EQ(replays.find(key(4)).count, 0);  // in the place of 2
  EXPECT_EQ(replays.size(), 3u);
  EXPECT_EQ(replays.find(key(1)).count, 1);
  EXPECT_EQ(replays.find(key(3)).count, 3);
  EXPECT_EQ(replays.find(key(2)).count, 0);
  EXPECT_EQ(replays.find(key(4)).count, 0);
  replays.disable();
  EXPECT_FALSE(replays.enabled());
  EXPECT_EQ(replays.size(), 0u);
  EXPECT_FALSE(Replays(0).enabled());
}

// A call whose launches would differ in anything is another call.
TEST(Replays, EveryArgumentCounts) {
  int memory[2];
  const CallKey base{.x = memory,
                     .ids = memory,
                     .weights = memory,
                     .out = memory,
                     .workspace = nullptr,
                     .stream = nullptr,
                     .tokens = 1,
                     .x_stride = 8,
                     .ids_stride = 2,
                     .weights_stride = 2,
                     .out_stride = 8,
                     .top_k = 2,
                     .x_type = DType::bfloat16,
                     .ids_type = DType::int32,
                     .out_type = DType::bfloat16,
                     .accumulate = false};
  std::vector<CallKey> others(16, base);
  others[0].x = others[1].ids = others[2].weights = others[3].out = others[4].workspace = memory + 1;
  others[5].stream = memory;
  others[6].tokens = others[7].x_stride = others[8].ids_stride = others[9].weights_stride = others[10].out_stride = 3;
  others[11].top_k = 3;
  others[12].x_type = others[13].out_type = DType::float16;
  others[14].ids_type = DType::int64;
  others[15].accumulate = true;
  Replays replays(17);
  replays.find(base).count = 1;
  for (const CallKey& other : others) EXPECT_EQ(replays.find(other).count, 0);
  EXPECT_EQ(replays.size(), 17u);
  EXPECT_EQ(replays.find(base).count, 1);
}

}  // namespace
}  // namespace octomoe::cuda
