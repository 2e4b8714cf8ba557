#include "cli/row_groups.h"

#include <gtest/gtest.h>

namespace octomoe::cli {
namespace {

std::int64_t sum(const std::vector<std::int64_t>& rows) {
  return std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
}
std::int64_t largest(const std::vector<std::int64_t>& rows) { return *std::max_element(rows.begin(), rows.end()); }

TEST(DrawRows, GivesEveryRowToSomebody) {
  for (const Skew skew : {Skew::even, Skew::uniform, Skew::zipf, Skew::quarter}) {
    for (const std::int64_t experts : {1, 2, 8, 256}) {
      for (const std::int64_t rows : {0, 1, 8, 1000}) {
        const auto drawn = draw_rows(skew, experts, rows, 3);
        EXPECT_EQ(drawn.size(), static_cast<std::size_t>(experts));
        EXPECT_EQ(sum(drawn), rows) << to_string(skew) << " " << experts;
        EXPECT_GE(*std::min_element(drawn.begin(), drawn.end()), 0);
        EXPECT_EQ(drawn, draw_rows(skew, experts, rows, 3));
      }
    }
  }
}

TEST(DrawRows, EachSkewIsWhatItSays) {
  const std::int64_t experts = 64, rows = 64'000;
  const auto even = draw_rows(Skew::even, experts, rows + 3, 1);
  EXPECT_EQ(largest(even), 1001);
  EXPECT_EQ(std::count(even.begin(), even.end(), 1001), 3);
  const auto uniform = draw_rows(Skew::uniform, experts, rows, 1);
  EXPECT_GT(largest(uniform), 1000);
  EXPECT_LT(largest(uniform), 1000 + 5 * 32);  // five standard deviations
  EXPECT_NE(uniform, draw_rows(Skew::uniform, experts, rows, 2));
  const auto quarter = draw_rows(Skew::quarter, experts, rows, 1);
  EXPECT_EQ(largest(quarter), rows / 4);
  EXPECT_LT(std::count_if(quarter.begin(), quarter.end(), [](std::int64_t r) { return r > 1000; }), 2);
  // 1 / sum of r^-1.2 over 64 experts is 0.28.
  const auto zipf = draw_rows(Skew::zipf, experts, rows, 1);
  EXPECT_NEAR(static_cast<double>(largest(zipf)) / static_cast<double>(rows), 0.28, 0.02);
}

TEST(TileUse, CountsPartlyFilledTiles) {
  TileUse use;
  const TileUse::Size size{.tokens = 32, .columns = 128};
  use.add(0, size, 1024, 2048);
  EXPECT_EQ(use.tiles, 0);
  EXPECT_EQ(use.waste(), 0.0);
  use.add(33, size, 1024, 2048);
  EXPECT_EQ(use.tiles, 2 * 8);
  EXPECT_DOUBLE_EQ(use.waste(), 1.0 - 33.0 / 64.0);
  EXPECT_DOUBLE_EQ(use.bytes, 8.0 * (2 * 128 + 33) * 2048);
  use.add(31, size, 1000, 2048);  // a partly filled column tile counts whole
  EXPECT_EQ(use.tiles, 3 * 8);
  EXPECT_DOUBLE_EQ(use.waste(), 1.0 - 64.0 / 96.0);
}

TEST(TileUse, TilesAsWideAsTheirRowsAndPairs) {
  TileUse even;
  even.add(130, {.tokens = 128, .columns = 256, .step = 16}, 256, 2048);  // 80 and 50 rows: 80 and 64 slots
  EXPECT_EQ(even.tiles, 2);
  EXPECT_DOUBLE_EQ(even.waste(), 1.0 - 130.0 / 144.0);
  TileUse full;
  full.add(130, {.tokens = 128, .columns = 256, .step = 32}, 256, 2048);  // 128 and 2 rows
  EXPECT_EQ(full.tiles, 2);
  EXPECT_DOUBLE_EQ(full.waste(), 1.0 - 130.0 / 160.0);
  TileUse pair;
  pair.add(5, {.tokens = 128, .columns = 256, .step = 16, .cluster = 2}, 256, 2048);  // the second tile is empty
  EXPECT_EQ(pair.tiles, 2);
  EXPECT_DOUBLE_EQ(pair.waste(), 1.0 - 5.0 / 16.0);
  EXPECT_DOUBLE_EQ(pair.bytes, (256.0 + 5) * 2048);
}

}  // namespace
}  // namespace octomoe::cli
