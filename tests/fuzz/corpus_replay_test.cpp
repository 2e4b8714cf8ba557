// Runs every seed and past finding of tests/fuzz/corpus through its fuzz target.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "fuzz/targets.h"

namespace octomoe::fuzz {
namespace {

class CorpusReplayTest : public testing::TestWithParam<std::string> {};

TEST_P(CorpusReplayTest, EveryFile) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(OCTOMOE_SOURCE_DIR "/tests/fuzz/corpus/" + GetParam())) {
    SCOPED_TRACE(entry.path().filename().string());
    std::ifstream in(entry.path(), std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(in), {}};
    kTargets.at(GetParam())({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()});
    ++files;
  }
  EXPECT_GE(files, 5);
}

INSTANTIATE_TEST_SUITE_P(Targets, CorpusReplayTest, testing::Values("safetensors", "config", "index"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace octomoe::fuzz
