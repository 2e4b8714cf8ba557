#include "cli/arguments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/presets.h"

namespace octomoe::cli {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

template <class Fn>
std::string message_of(const Fn& fn) {
  try {
    fn();
  } catch (const UsageError& e) {
    return e.what();
  }
  return "";
}

TEST(Integers, ReadsLists) {
  EXPECT_THAT(parse_integers("--tokens", "1,16,128", 1, 1000), ElementsAre(1, 16, 128));
  for (const char* bad : {"", ",", "1,", ",1", "1,,2", "x", "1 ", "1.5", "1e3", "99999999999999999999"}) {
    EXPECT_THAT(message_of([&] { parse_integers("--tokens", bad, 1, 1000); }),
                HasSubstr("--tokens: expected an integer"))
        << "'" << bad << "'";
  }
  EXPECT_EQ(message_of([] { parse_integers("--tokens", "4,0", 1, 1000); }), "--tokens: expected 1 to 1000, got 0");
  EXPECT_EQ(message_of([] { parse_integers("--tokens", "1001", 1, 1000); }), "--tokens: expected 1 to 1000, got 1001");
}

TEST(Layers, ReadsRanges) {
  EXPECT_THAT(parse_layers("0,3-5"), ElementsAre(0, 3, 4, 5));
  EXPECT_THAT(parse_layers("7-7"), ElementsAre(7));
  for (const char* bad : {"", "a", "3-", "-3", "5-3", "1--2"}) {
    EXPECT_THAT(message_of([&] { parse_layers(bad); }), HasSubstr("--layers")) << "'" << bad << "'";
  }
}

TEST(Schemes, AllIsEveryKind) { EXPECT_EQ(parse_schemes("--schemes", "all"), all_schemes()); }

TEST(Schemes, CommasSeparateSchemesAndTheirOptions) {
  Scheme hybrid = Scheme::int8_hybrid();
  hybrid.q_max = 32;
  hybrid.super_group = 8;
  EXPECT_THAT(parse_schemes("--schemes", "bf16,int8_hybrid:super=8,q_max=32,int8_channel"),
              ElementsAre(Scheme::bf16(), hybrid, Scheme::int8_channel()));
}

TEST(Schemes, ErrorsNameTheOption) {
  for (const char* bad :
       {"", "int4", "bf16,", "bf16,fast", "int8_hybrid:q_max=0", "all,bf16", "bf16,bf16", "bf16,all"}) {
    EXPECT_THAT(message_of([&] { parse_schemes("--schemes", bad); }), HasSubstr("--schemes: ")) << "'" << bad << "'";
  }
}

TEST(HybridParameters, AreSetOnEveryHybrid) {
  std::vector<Scheme> schemes = parse_schemes("--schemes", "int8_block,int8_hybrid,int8_hybrid:q_max=32");
  set_hybrid({.block_k = 64, .super_group = 4}, schemes);
  EXPECT_EQ(schemes, parse_schemes("--schemes",
                                   "int8_block,int8_hybrid:block_k=64,super=4,"
                                   "int8_hybrid:block_k=64,super=4,q_max=32"));
  set_hybrid({}, schemes);
  set_hybrid({.super_group = 4}, schemes);  // says what is so already
  EXPECT_EQ(schemes[1].super_group, 4);
}

TEST(HybridParameters, ErrorsNameTheOption) {
  const auto message = [](const std::string& text, const HybridParameters& p) {
    std::vector<Scheme> schemes = parse_schemes("--schemes", text);
    return message_of([&] { set_hybrid(p, schemes); });
  };
  EXPECT_THAT(message("int8_block,bf16", {.q_max = 8}), HasSubstr("--q-max: expected int8_hybrid among --schemes"));
  EXPECT_THAT(message("int8_hybrid:q_max=32", {.q_max = 8}), HasSubstr("--q-max: expected what --schemes says"));
  EXPECT_THAT(message("int8_hybrid", {.block_k = 48}), HasSubstr("--quant-block-size: scheme int8_hybrid: block_k"));
  EXPECT_THAT(message("int8_hybrid", {.super_group = 70000}), HasSubstr("--super-group-size: "));
  EXPECT_THAT(message("int8_hybrid,int8_hybrid:q_max=32", {.q_max = 32}), HasSubstr("given twice"));
}

TEST(Sizes, KnowsUnits) {
  EXPECT_EQ(parse_size("--max-shard-size", "1000"), 1000);
  EXPECT_EQ(parse_size("--max-shard-size", "5GB"), 5'000'000'000);
  EXPECT_EQ(parse_size("--max-shard-size", "1.5 GiB"), 1'610'612'736);
  EXPECT_EQ(parse_size("--max-shard-size", "512MiB"), 512ll << 20);
  for (const char* bad : {"", "GB", "5gb", "-1", "0", "nan", "inf", "1e300", "5GBx"}) {
    EXPECT_THAT(message_of([&] { parse_size("--max-shard-size", bad); }),
                HasSubstr("--max-shard-size: expected a size"))
        << "'" << bad << "'";
  }
}

TEST(Presets, AreFoundByName) {
  const Preset& p = find_preset("deepseek-v3");
  EXPECT_EQ(p.hidden, 7168);
  EXPECT_EQ(p.intermediate, 2048);
  EXPECT_EQ(p.experts, 256);
  EXPECT_EQ(p.top_k, 8);
  EXPECT_THAT(message_of([] { find_preset("gpt"); }),
              testing::AllOf(HasSubstr("'gpt'"), HasSubstr("qwen3-30b, qwen3-235b")));
}

TEST(Presets, AreLayersThatEverySchemeTakes) {
  for (const Preset& p : kPresets) {
    EXPECT_EQ(p.hidden % 128, 0) << p.name;
    EXPECT_EQ(p.intermediate % 128, 0) << p.name;
    EXPECT_LE(p.top_k, p.experts) << p.name;
    EXPECT_EQ(&find_preset(p.name), &p);
  }
}

}  // namespace
}  // namespace octomoe::cli
