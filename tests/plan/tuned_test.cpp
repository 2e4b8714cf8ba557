// Tables that `octomoe tune` writes: what is read back, which row count answers, what is refused.
#include "plan/tuned.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "plan/cost.h"
#include "support/errors.h"

namespace octomoe::plan {
namespace {

using kernels::Epilogue;
using kernels::Promotion;
using testing::expect_error;

std::string some_kernel(std::size_t i) { return wgmma_kernels(Promotion::channel, Epilogue::swiglu, 0)[i].id; }

TuneKey table_key(std::int64_t k = 2048) {
  return {.device = "GPU", .multiprocessors = 132, .epilogue = Epilogue::swiglu, .experts = 128, .n = 1536, .k = k};
}

TEST(TunedTable, SurvivesItsFile) {
  TunedTable table;
  table.set(table_key(), 8192, {some_kernel(0), {{some_kernel(0), 12.5}, {some_kernel(1), 13}}});
  table.set(table_key(512), 64, {some_kernel(1), {{some_kernel(1), 3}}});
  const TunedTable back = TunedTable::parse(table.text(), "file");
  EXPECT_EQ(back.text(), table.text());
  EXPECT_EQ(back.size(), 2u);
  EXPECT_EQ(back.count("GPU"), 2u);
  EXPECT_EQ(back.count("another"), 0u);
  ASSERT_NE(back.find(table_key(), 8192), nullptr);
  EXPECT_EQ(back.find(table_key(), 8192)->us.at(some_kernel(1)), 13);
}

TEST(TuneChoice, OfKernelsThatMayBeUsed) {
  const std::vector<GemmKernel> list = mma_kernels(Promotion::channel, Epilogue::swiglu, 0, 90);
  ASSERT_GE(list.size(), 3u);
  const auto all = [](const GemmKernel&) { return true; };
  // Its own, though another was as fast.
  TuneChoice choice{list[1].id, {{list[0].id, 12.9}, {list[1].id, 13}, {list[2].id, 11}}};
  EXPECT_EQ(choice.best_of(list, all, all), &list[1]);
  // Another family's: the fastest of these that was measured, and may be used.
  choice.kernel = some_kernel(0);
  choice.us[some_kernel(0)] = 5;
  EXPECT_EQ(choice.best_of(list, all, all), &list[2]);
  EXPECT_EQ(choice.best_of(
                list, [&](const GemmKernel& k) { return k.id != list[2].id; }, all),
            &list[0]);
  // One that is preferred, unless the other is faster by more than a little.
  const auto first = [&](const GemmKernel& k) { return &k == &list[0]; };
  choice = {list[1].id, {{list[0].id, 10.5}, {list[1].id, 10}}};
  EXPECT_EQ(choice.best_of(list, all, first), &list[0]);
  choice.us[list[0].id] = 10.7;
  EXPECT_EQ(choice.best_of(list, all, first), &list[1]);
  choice.us.erase(list[0].id);
  EXPECT_EQ(choice.best_of(list, all, first), &list[1]);
  // None was.
  choice.kernel = some_kernel(0);
  choice.us = {{some_kernel(0), 5}};
  EXPECT_EQ(choice.best_of(list, all, all), nullptr);
}

TEST(TunedTable, TheNearestRowsAnswerWithinAFactorOfTwo) {
  TunedTable table;
  table.set(table_key(), 100, {some_kernel(0), {}});
  table.set(table_key(), 1000, {some_kernel(1), {}});
  const auto kernel = [&](std::int64_t rows) {
    const TuneChoice* c = table.find(table_key(), rows);
    return c == nullptr ? "" : c->kernel;
  };
  EXPECT_EQ(kernel(100), some_kernel(0));
  EXPECT_EQ(kernel(50), some_kernel(0));
  EXPECT_EQ(kernel(49), "");
  EXPECT_EQ(kernel(200), some_kernel(0));
  EXPECT_EQ(kernel(201), "");
  EXPECT_EQ(kernel(499), "");
  EXPECT_EQ(kernel(500), some_kernel(1));
  EXPECT_EQ(kernel(2000), some_kernel(1));
  EXPECT_EQ(table.find(table_key(1024), 100), nullptr);
}

TEST(TunedTable, ANewerTableWins) {
  TunedTable shipped, user;
  shipped.set(table_key(), 100, {some_kernel(0), {}});
  shipped.set(table_key(), 800, {some_kernel(0), {}});
  user.set(table_key(), 100, {some_kernel(1), {}});
  shipped.merge(user);
  EXPECT_EQ(shipped.find(table_key(), 100)->kernel, some_kernel(1));
  EXPECT_EQ(shipped.find(table_key(), 800)->kernel, some_kernel(0));
  EXPECT_EQ(shipped.kernels(table_key()).size(), 2u);
}

TEST(TunedTable, AnotherNumberOfMultiprocessorsIsAnotherDevice) {
  TunedTable table;
  table.set(table_key(), 100, {some_kernel(0), {}});
  TuneKey part = table_key();
  part.multiprocessors = 66;
  EXPECT_EQ(table.find(part, 100), nullptr);
}

TEST(TunedTable, ItsFileHasALineForEachEntry) {
  TunedTable table;
  EXPECT_TRUE(TunedTable::parse(table.text(), "file").empty());
  for (const int rows : {1, 10, 100}) table.set(table_key(), rows, {some_kernel(0), {{some_kernel(0), rows}}});
  const std::string text = table.text();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 5);
  EXPECT_EQ(nlohmann::json::parse(text)["entries"].size(), 3u);
}

// What is installed with the library.
TEST(ShippedTable, IsWholeAndItsChoicesAreFast) {
  const std::string path = OCTOMOE_SOURCE_DIR "/share/tuned.json";
  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file);
  const TunedTable table = TunedTable::read(path);
  EXPECT_EQ(table.size(), json["entries"].size()) << "kernels that the catalogue does not have: measure it again";
  for (const auto& [key, by_rows] : table.entries()) {
    for (const auto& [rows, choice] : by_rows) {
      ASSERT_TRUE(choice.us.contains(choice.kernel)) << choice.kernel;
      for (const auto& [kernel, us] : choice.us) {
        EXPECT_GT(us, 0);
        EXPECT_GE(us * 1.02, choice.us.at(choice.kernel)) << kernel << " at " << rows << " rows";
      }
    }
  }
}

TEST(TunedTable, KernelsOfOtherVersionsAreLeftOut) {
  TunedTable table;
  table.set(table_key(), 100, {"sm90_gemm:that_was", {}});
  EXPECT_TRUE(TunedTable::parse(table.text(), "file").empty());
}

TEST(TunedTable, BadFiles) {
  const auto refuse = [](const std::string& text, const std::string& why) {
    expect_error(ErrorCode::format, why, [&] { TunedTable::parse(text, "tuned.json"); });
  };
  refuse("", "tuned.json: ");
  refuse("[]", "tuned.json: ");
  refuse(R"({"version": 2, "entries": []})", "tuned.json: version: expected 1, got 2");
  refuse(R"({"version": 1})", "entries");
  const std::string entry =
      R"({"version": 1, "entries": [{"device": "G", "multiprocessors": 1, "promotion": "%", "epilogue": "store",
    "block_k": 0, "experts": 1, "n": 32, "k": 16, "rows": 0, "kernel": "x", "us": {}}]})";
  refuse(entry, "tuned.json: promotion: \"%\" is not known");
  std::string rows = entry;
  refuse(rows.replace(rows.find('%'), 1, "channel"), "tuned.json: rows: expected a positive number, got 0");
  expect_error(ErrorCode::io, "/nowhere/tuned.json", [] { TunedTable::read("/nowhere/tuned.json"); });
}

}  // namespace
}  // namespace octomoe::plan
