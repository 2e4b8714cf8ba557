#include "cli/harness.h"

#include <gtest/gtest.h>

namespace octomoe::cli {
namespace {

TEST(Quantile, InterpolatesLikeNumPy) {
  const std::vector<double> v = {4, 1, 3, 2};
  EXPECT_DOUBLE_EQ(quantile(v, 0.0), 1.0);
  EXPECT_DOUBLE_EQ(quantile(v, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(quantile(v, 0.1), 1.3);  // numpy.quantile([1, 2, 3, 4], 0.1)
  EXPECT_DOUBLE_EQ(quantile(v, 0.9), 3.7);
  EXPECT_DOUBLE_EQ(quantile(v, 1.0), 4.0);
  EXPECT_DOUBLE_EQ(quantile({7}, 0.9), 7.0);
  EXPECT_TRUE(std::isnan(quantile({}, 0.5)));
}

TEST(Timing, SummarisesSamples) {
  std::vector<double> samples;
  for (int i = 0; i <= 100; ++i) samples.push_back(i);
  const Timing t = Timing::of(samples);
  EXPECT_DOUBLE_EQ(t.median_us, 50);
  EXPECT_DOUBLE_EQ(t.p10_us, 10);
  EXPECT_DOUBLE_EQ(t.p90_us, 90);
  EXPECT_DOUBLE_EQ(t.min_us, 0);
  EXPECT_EQ(t.rounds, 101);
  EXPECT_DOUBLE_EQ(t.spread(), 0.8);
}

// The order of the calls, as letters.
std::string calls(int contenders, const HarnessOptions& options, double us) {
  std::string order;
  std::vector<Contender> list;
  for (int i = 0; i < contenders; ++i) {
    list.push_back({std::string(1, static_cast<char>('a' + i)), [&order, i, us] {
                      order += static_cast<char>('a' + i);
                      return us;
                    }});
  }
  interleave(list, options);
  return order;
}

TEST(Interleave, TakesTurnsAndAlternatesDirection) {
  EXPECT_EQ(calls(3, {.warmup = 1, .iters = 3}, 1.0),
            "abc"
            "abc"
            "cba"
            "abc");
  EXPECT_EQ(calls(0, {.warmup = 1, .iters = 3}, 1.0), "");
}

TEST(Interleave, StopsByTimeRoundsOrLimit) {
  // 0.1 s a call, 0.35 s asked for: four rounds are enough for the time, but five are the least.
  EXPECT_EQ(calls(2, {.warmup = 0, .min_time_s = 0.35, .min_rounds = 5}, 1e5).size(), 10u);
  EXPECT_EQ(calls(2, {.warmup = 0, .min_time_s = 0.75, .min_rounds = 5}, 1e5).size(), 16u);
  EXPECT_EQ(calls(1, {.warmup = 0, .min_time_s = 100, .min_rounds = 5, .max_rounds = 20}, 1.0).size(), 20u);
  EXPECT_EQ(calls(1, {.warmup = 0, .min_time_s = 0.0, .min_rounds = 5}, 1.0).size(), 5u);
}

TEST(Interleave, WaitsForTheFastestContender) {
  int fast = 0;
  const std::vector<Contender> list = {{"slow", [] { return 1e6; }}, {"fast", [&] { return ++fast, 1e5; }}};
  interleave(list, {.warmup = 0, .min_time_s = 0.95, .min_rounds = 1});
  EXPECT_EQ(fast, 10);
}

TEST(Interleave, TimeCountsEveryCallOfARound) {
  int rounds = 0;
  const std::vector<Contender> list = {{"sixteen calls", [&] { return ++rounds, 1e4; }, 16}};
  interleave(list, {.warmup = 0, .min_time_s = 0.95, .min_rounds = 1});
  EXPECT_EQ(rounds, 6);  // 0.16 s each
}

TEST(Interleave, WarmUpIsNotCounted) {
  int n = 0;
  const auto timings = interleave({{"a", [&] { return n++ == 0 ? 1e9 : 5.0; }}}, {.warmup = 1, .iters = 4});
  ASSERT_EQ(timings.size(), 1u);
  EXPECT_DOUBLE_EQ(timings[0].median_us, 5.0);
  EXPECT_EQ(timings[0].rounds, 4);
}

TEST(Interleave, ReportsProgressUpToOne) {
  double last = 0;
  int rounds = 0;
  interleave({{"a", [] { return 1.0; }}}, {.warmup = 0, .iters = 4}, [&](int round, double fraction) {
    EXPECT_GT(fraction, last);
    last = fraction;
    rounds = round;
  });
  EXPECT_EQ(rounds, 4);
  EXPECT_DOUBLE_EQ(last, 1.0);
}

TEST(FloorOf, TakesTheLongerOne) {
  const Floor memory = floor_of(1e9, 10e9, 1e9, 1e12);
  EXPECT_DOUBLE_EQ(memory.us, 1e5);
  EXPECT_TRUE(memory.by_memory);
  const Floor compute = floor_of(1e6, 10e9, 1e12, 1e12);
  EXPECT_DOUBLE_EQ(compute.us, 1e6);
  EXPECT_FALSE(compute.by_memory);
}

}  // namespace
}  // namespace octomoe::cli
