// Rows of experts, and what becomes of them in tiles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "quant/matrix.h"

namespace octomoe::cli {

// How rows fall on experts.
enum class Skew {
  even,     // as equal as can be
  uniform,  // every row anywhere
  zipf,     // the r-th most popular expert with weight 1 / r^1.2
  quarter,  // one expert has a quarter of the rows, the others share the rest at random
};
inline const char* to_string(Skew skew) {
  static constexpr const char* kNames[] = {"even", "uniform", "zipf:1.2", "quarter"};
  return kNames[static_cast<int>(skew)];
}

// How many rows each expert gets; every row is given to somebody.
inline std::vector<std::int64_t> draw_rows(Skew skew, std::int64_t experts, std::int64_t rows, std::uint64_t seed) {
  const auto count = static_cast<std::size_t>(experts);
  std::vector<std::int64_t> result(count, 0);
  std::mt19937_64 random(seed);
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (std::size_t i = count - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  if (skew == Skew::even) {
    for (std::size_t i = 0; i < count; ++i) {
      result[order[i]] = rows / experts + (static_cast<std::int64_t>(i) < rows % experts ? 1 : 0);
    }
    return result;
  }
  std::int64_t drawn = rows;
  std::vector<double> until(count);  // the sum of the weights up to the i-th in `order`
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    double weight = 1.0;
    if (skew == Skew::zipf) weight = std::pow(static_cast<double>(i + 1), -1.2);
    if (skew == Skew::quarter && i == 0 && count > 1) weight = 0.0;
    until[i] = sum += weight;
  }
  if (skew == Skew::quarter) {
    result[order[0]] = (rows + 3) / 4;
    drawn -= result[order[0]];
  }
  for (std::int64_t i = 0; i < drawn; ++i) {
    const double at = sum * (static_cast<double>(random() >> 11) * 0x1p-53);
    const auto found = std::upper_bound(until.begin(), until.end(), at);
    ++result[order[std::min(static_cast<std::size_t>(found - until.begin()), count - 1)]];
  }
  return result;
}

// Tiles, and what they ask memory for.
struct TileUse {
  std::int64_t tiles = 0, token_slots = 0, rows = 0;
  double bytes = 0;  // that the tiles ask L2 for

  struct Size {
    std::int64_t tokens, columns;  // at most; weight rows are columns
    std::int64_t step = 0;         // > 0: tiles are as wide as their rows, in such steps
    std::int64_t cluster = 1;      // tiles of an expert that go together and share weights
  };
  void add(std::int64_t rows_of_expert, const Size& size, std::int64_t n, std::int64_t k) {
    if (rows_of_expert == 0) return;
    const std::int64_t token_tiles = ceil_div(rows_of_expert, size.tokens * size.cluster) * size.cluster;
    const std::int64_t column_tiles = ceil_div(n, size.columns);
    tiles += token_tiles * column_tiles;
    rows += rows_of_expert;
    token_slots += size.step > 0 ? ceil_div(rows_of_expert, size.step) * size.step : token_tiles * size.tokens;
    const std::int64_t weight_rows = token_tiles / size.cluster * size.columns;
    bytes += static_cast<double>(column_tiles * (weight_rows + rows_of_expert) * k);
  }
  // The part of the tiles' tokens that are not there.
  double waste() const {
    return token_slots > 0 ? 1.0 - static_cast<double>(rows) / static_cast<double>(token_slots) : 0.0;
  }
};

}  // namespace octomoe::cli
