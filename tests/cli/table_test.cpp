#include "cli/table.h"

#include <gtest/gtest.h>

#include <limits>

namespace octomoe::cli {
namespace {

TEST(Table, AlignsTextLeftAndNumbersRight) {
  Table t({{"scheme", true}, {"time"}, {"note", true}});
  t.add({"bf16", "1.00", "slow"});
  t.add({"int8_channel", "12.50", ""});
  EXPECT_EQ(t.render(false),
            "scheme         time  note\n"
            "bf16           1.00  slow\n"
            "int8_channel  12.50\n");
}

TEST(Table, ColourDoesNotMoveColumns) {
  Table t({{"a", true}, {"b"}});
  t.add({{"x", Style::good}, {"1", Style::bold}});
  t.add({"long", "22"});
  EXPECT_EQ(t.render(true),
            "\x1b[1ma\x1b[0m      \x1b[1mb\x1b[0m\n"
            "\x1b[32mx\x1b[0m      \x1b[1m1\x1b[0m\n"
            "long  22\n");
}

TEST(Table, CountsCharactersNotBytes) {
  EXPECT_EQ(display_width("µs"), 2u);
  Table t({{"µ", true}, {"b"}});
  t.add({"ab", "1"});
  EXPECT_EQ(t.render(false), "µ   b\nab  1\n");
}

TEST(Table, ShortRowsAreFilled) {
  Table t({{"a", true}, {"b"}, {"c"}});
  t.add({"x"});
  EXPECT_EQ(t.render(false), "a  b  c\nx\n");
}

TEST(Format, Errors) {
  EXPECT_EQ(format_error(0.0), "0");
  EXPECT_EQ(format_error(0.0228), "2.28 %");
  EXPECT_EQ(format_error(0.0005), "0.050 %");
  EXPECT_EQ(format_error(1.5e-7), "1.5e-07");
  EXPECT_EQ(format_error(std::numeric_limits<double>::quiet_NaN()), "NaN");
}

TEST(Format, Times) {
  EXPECT_EQ(format_us(1.234), "1.23 us");
  EXPECT_EQ(format_us(12.34), "12.3 us");
  EXPECT_EQ(format_us(1234), "1234 us");
  EXPECT_EQ(format_us(12340), "12.34 ms");
  EXPECT_EQ(format_us(123400), "123.4 ms");
  EXPECT_EQ(format_us(2.5e6), "2.50 s");
  EXPECT_EQ(format_us(std::numeric_limits<double>::infinity()), "-");
}

TEST(Format, BytesAndRatios) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1024), "1.00 KiB");
  EXPECT_EQ(format_bytes(604.0 * 1024 * 1024), "604 MiB");
  EXPECT_EQ(format_bytes(11.3 * 1024 * 1024 * 1024), "11.3 GiB");
  EXPECT_EQ(format_ratio(2.0), "2.00x");
  EXPECT_EQ(format_ratio(0.0312), "0.031x");
  EXPECT_EQ(format_ratio(std::numeric_limits<double>::quiet_NaN()), "-");
}

TEST(Progress, FitsTheTerminal) {
  EXPECT_EQ(Progress::render("work", 0.5, "layer 3", 200), "work [############............]  50%  layer 3");
  EXPECT_EQ(Progress::render("work", 7.0, "", 200), "work [########################] 100%");
  EXPECT_EQ(Progress::render("work", 0.0, "a long text", 20).size(), 20u);
}

}  // namespace
}  // namespace octomoe::cli
