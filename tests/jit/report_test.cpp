#include "jit/report.h"

#include <gmock/gmock.h>

#include "jit/sass.h"

namespace octomoe::jit {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Report, ReadsPtxas) {
  const ResourceReport r = parse_report(
      "ptxas info    : 0 bytes gmem\n"
      "ptxas info    : Compiling entry function 'octomoe_kernel' for 'sm_90a'\n"
      "ptxas info    : Function properties for octomoe_kernel\n"
      "ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
      "ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem\r\n"
      "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...\n"
      "note C75 and C7x10 and C75a0 are no codes\n");
  EXPECT_EQ(r.registers, 168);
  EXPECT_EQ(r.stack_bytes, 16);
  EXPECT_EQ(r.spill_store_bytes, 12);
  EXPECT_EQ(r.spill_load_bytes, 8);
  EXPECT_EQ(r.static_shared_bytes, 1024);
  EXPECT_THAT(r.warnings, ElementsAre(HasSubstr("(C7510)")));
  EXPECT_EQ(parse_report("").registers, -1);
  EXPECT_EQ(parse_report("99999999999999 registers").registers, -1);  // not a number of ours
}

TEST(Report, Faults) {
  ResourceReport r;
  r.registers = 32;
  EXPECT_THAT(faults(r, ""), ElementsAre());
  EXPECT_THAT(faults(r, "IMMA"), ElementsAre());  // not counted is not missing
  r.tensor_instructions = 4;
  EXPECT_THAT(faults(r, "IMMA"), ElementsAre());
  r.tensor_instructions = 0;
  EXPECT_THAT(faults(r, "IMMA"), ElementsAre("has no IMMA in its SASS"));
  EXPECT_THAT(faults(r, ""), ElementsAre());
  r.spill_load_bytes = 8;
  r.stack_bytes = 16;
  r.warnings = {"C7510 here"};
  EXPECT_THAT(faults(r, ""), ElementsAre("spills 8 bytes", "uses 16 bytes of local memory", "C7510 here"));
}

TEST(Report, FirstErrorLine) {
  EXPECT_EQ(first_error("a.cuh(3): warning #1: x\n\n  a.cuh(4): error: identifier \"y\" is undefined\nmore error\n"),
            "a.cuh(4): error: identifier \"y\" is undefined");
  EXPECT_EQ(first_error("\n  something else \nb\n"), "something else");
  EXPECT_EQ(first_error(""), "");
}

TEST(Sass, CountsWholeMnemonics) {
  const char* sass =
      "        /*0000*/  IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;\n"
      "        /*0010*/  @!P0 IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4 ;\n"
      "        /*0020*/  IGMMA.64x128x32.S8.S8 gdesc[UR4] ;\n"
      "        /*0030*/  UIMMA R1 ;\n"
      "        /*0040*/\tIMMA R1 ;\n"
      "        /*0050*/  IMMA2 R1 ;\n";
  EXPECT_EQ(count_mnemonic(sass, "IMMA"), 3);
  EXPECT_EQ(count_mnemonic(sass, "IMMA.16832"), 2);
  EXPECT_EQ(count_mnemonic(sass, "IGMMA"), 1);
  EXPECT_EQ(count_mnemonic(sass, "HMMA"), 0);
}

}  // namespace
}  // namespace octomoe::jit
