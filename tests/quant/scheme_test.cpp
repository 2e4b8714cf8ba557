#include "octomoe/scheme.h"

#include <gtest/gtest.h>

#include "support/errors.h"

namespace octomoe {
namespace {

TEST(Scheme, TextParsesBack) {
  for (const char* text :
       {"int8_channel", "int8_channel:static", "int8_channel:asymmetric", "int8_channel:static,per_tensor",
        "int8_block", "int8_block:block_n=64,block_k=256", "int8_hybrid", "int8_hybrid:super=4,q_max=32", "w4a8_fp8",
        "w4a8_fp8:static,group=0", "w4a8_fp8:none", "bf16", "fp16"}) {
    EXPECT_EQ(to_string(Scheme::parse(text)), text);
  }
  EXPECT_EQ(Scheme::parse("int8_block:block=64").block_n, 64);
  EXPECT_EQ(all_schemes().size(), 6u);
}

TEST(Scheme, BadTextNamesThePart) {
  using testing::expect_error;
  expect_error("got \"int9\"", [] { Scheme::parse("int9"); });
  expect_error("got \"fast\"", [] { Scheme::parse("int8_channel:fast"); });
  expect_error("expected a whole number for q_max, got \"x\"", [] { Scheme::parse("int8_hybrid:q_max=x"); });
  expect_error("q_max: expected 1..64, got 65", [] { Scheme::parse("int8_hybrid:q_max=65"); });
  expect_error("block_k: expected a multiple of 32", [] { Scheme::parse("int8_block:block_k=100"); });
  expect_error("asymmetric: expected false", [] { Scheme::parse("int8_block:asymmetric"); });
  expect_error("activation_scale: expected dynamic, got static", [] { Scheme::parse("int8_hybrid:static"); });
  expect_error("activation_scale: expected dynamic or static, got none", [] { Scheme::parse("int8_channel:none"); });
  expect_error("group_size: expected 0", [] { Scheme::parse("w4a8_fp8:group=48"); });
  expect_error("block: expected the default", [] { Scheme::parse("bf16:block=64"); });
  expect_error("got \"\"", [] { Scheme::parse("int8_channel:"); });
}

TEST(Activation, NamesParseBack) {
  for (int i = 0; i < 10; ++i)
    EXPECT_EQ(parse_activation(to_string(static_cast<Activation>(i))), static_cast<Activation>(i));
  EXPECT_EQ(parse_activation("gelu"), Activation::gelu_erf);
  testing::expect_error("activation: expected one of swiglu", [] { parse_activation("swish"); });
  testing::expect_error("gate_up_order", [] { parse_gate_up_order("upgate"); });
}

}  // namespace
}  // namespace octomoe
