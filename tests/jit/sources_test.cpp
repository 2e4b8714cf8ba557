#include "jit/sources.h"

#include <gmock/gmock.h>

#include "jit/support.h"
#include "support/errors.h"

namespace octomoe::jit {
namespace {

using octomoe::testing::expect_error;
using ::testing::ElementsAre;

std::vector<std::string> names(const std::string& text) {
  std::vector<std::string> out;
  for (const Include& i : parse_includes(text, "x.cuh")) out.push_back((i.system ? "<" : "") + i.name);
  return out;
}

TEST(Includes, AreFoundInOrderWithTheirLines) {
  const auto found =
      parse_includes("// purpose\n#pragma once\n\n#include \"a.h\"\n  #  include   \"b/c.cuh\"  // why\n", "x");
  EXPECT_THAT(found, ElementsAre(Include{"a.h", 4, false}, Include{"b/c.cuh", 5, false}));
}

TEST(Includes, InBothBranchesOfACondition) {
  EXPECT_THAT(names("#if 0\n#include \"a.h\"\n#else\n#include <b>\n#endif\n"), ElementsAre("a.h", "<b"));
}

TEST(Includes, NotInCommentsOrLiterals) {
  EXPECT_THAT(names("/* \n#include \"a.h\"\n*/ #include \"b.h\"\n"), ElementsAre("b.h"));
  EXPECT_THAT(names("// text \\\n#include \"a.h\"\n#include \"b.h\"\n"), ElementsAre("b.h"));
  EXPECT_THAT(names("const char* s = \"/*\";\n#include \"b.h\"\n// */\n"), ElementsAre("b.h"));
  EXPECT_THAT(names("const char* s = R\"x(\n#include \"a.h\"\n)\" )x\";\n#include \"b.h\"\n"), ElementsAre("b.h"));
  EXPECT_THAT(names("auto s = u8R\"(\n#include \"a.h\"\n)\";\n#include \"b.h\"\n"), ElementsAre("b.h"));
  EXPECT_THAT(names("char c = '\"';\n#include \"b.h\"\nchar d = '\\'';\n#include \"c.h\"\n"),
              ElementsAre("b.h", "c.h"));
  EXPECT_THAT(names("int n = 1'000'000;\n#include \"b.h\"\n"), ElementsAre("b.h"));
  EXPECT_THAT(names("int x; #include \"a.h\"\n"), ElementsAre());
}

TEST(Includes, AcrossSplicedLinesAndCarriageReturns) {
  EXPECT_THAT(names("#inc\\\nlude \"a.h\"\r\n#include \"b.h\"\r\n"), ElementsAre("a.h", "b.h"));
  EXPECT_THAT(names("#/* x */include/* y */\"a//b.h\""), ElementsAre("a//b.h"));
  EXPECT_THAT(names("#include \"last.h\""), ElementsAre("last.h"));
}

TEST(Includes, OtherDirectivesAreLeftAlone) {
  EXPECT_THAT(names("#define X \"a.h\"\n#include_next \"b.h\"\n#error it's fine\n#include \"c.h\"\n"),
              ElementsAre("c.h"));
}

TEST(Includes, ComputedOnesAreRefused) {
  expect_error(ErrorCode::internal, "kernels/x.cuh:2: expected #include", [] { names("\n#include NAME\n"); });
  expect_error(ErrorCode::internal, "kernels/x.cuh:1", [] { names("#include \"open\n"); });
  expect_error(ErrorCode::internal, "kernels/x.cuh:1", [] { names("#include"); });
}

TEST(Includes, SurviveEveryCutOfATrickyText) {
  const std::string text = "#if 1 /* c */\n#include \"a.h\"\nR\"d(\" /* )d\" 'x' \"\\\"\" 1'0\n// \\\n #include <b>\n#";
  for (std::size_t n = 0; n <= text.size(); ++n) {
    try {
      parse_includes(text.substr(0, n), "x");
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::internal);
    }
  }
}

std::vector<std::string> closure_names(const SourceSet& s, const std::string& header) {
  std::vector<std::string> out;
  for (const auto* file : s.closure(header)) out.push_back(file->first);
  return out;
}

TEST(SourceSet, ClosureIsSortedAndFollowsCycles) {
  SourceSet s;
  s.set("m.cuh", "#include \"z.h\"\n#include \"a.h\"\n#include <cstdint>\n");
  s.set("z.h", "#include \"m.cuh\"\n#include <b.h>\n");
  s.set("a.h", "");
  s.set("b.h", "");
  s.set("c.h", "");
  EXPECT_THAT(closure_names(s, "m.cuh"), ElementsAre("a.h", "b.h", "m.cuh", "z.h"));
  EXPECT_THAT(closure_names(s, "a.h"), ElementsAre("a.h"));
}

TEST(SourceSet, MissingFilesAreNamed) {
  SourceSet s;
  s.set("m.cuh", "\n\n#include \"gone.h\"\n");
  expect_error(ErrorCode::internal, "kernels/m.cuh:3: includes \"gone.h\"", [&] { s.closure("m.cuh"); });
  expect_error(ErrorCode::internal, "kernels/other.cuh: no such", [&] { s.closure("other.cuh"); });
}

// Every embedded file is what lies in kernels/, byte for byte, and its includes can all be followed.
TEST(EmbeddedKernels, AreTheFilesOfTheTree) {
  namespace fs = std::filesystem;
  const fs::path root = fs::path(OCTOMOE_SOURCE_DIR) / "kernels";
  const SourceSet& set = SourceSet::embedded();
  int files = 0;
  for (const auto& e : fs::recursive_directory_iterator(root)) {
    const std::string extension = e.path().extension().string();
    if (extension != ".cuh" && extension != ".h") continue;
    const std::string name = fs::relative(e.path(), root).string();
    const std::string* text = set.find(name);
    ASSERT_NE(text, nullptr) << name;
    EXPECT_EQ(*text, testing::read_file(e.path())) << name;
    EXPECT_NO_THROW(set.closure(name));
    ++files;
  }
  EXPECT_GT(files, 0);
}

}  // namespace
}  // namespace octomoe::jit
