// SafetensorsWriter: layout, and the old file intact on every failure.
#include <fcntl.h>
#include <sys/resource.h>

#include <csignal>

#include "checkpoint/test_files.h"

namespace octomoe::test {
namespace {

using testing::ElementsAre;

class SafetensorsWriterTest : public testing::Test {
 protected:
  using Entries = std::vector<SafetensorsWriter::Entry>;
  TempDir dir_;
  std::string path_ = dir_ / "m.safetensors";
};

TEST_F(SafetensorsWriterTest, WritesWhatTheReaderReads) {
  const auto a = int_tensor("a", "I8", {3, 5}, -100, 100);
  const auto b = float_tensor("b \"quoted\" \xc3\xa9", "F32", {2, 2});
  SafetensorsWriter writer(path_,
                           Entries{{a.name, a.dtype, a.shape}, {b.name, b.dtype, b.shape}, {"empty", "BF16", {0}}},
                           {{"format", "pt"}});
  writer.write(b.name, b.bytes.data(), 7);  // in any order and in pieces
  writer.write(a.name, a.bytes.data(), a.bytes.size());
  writer.write(b.name, b.bytes.data() + 7, b.bytes.size() - 7);
  writer.finish();
  const SafetensorsFile file = SafetensorsFile::open(path_);
  EXPECT_EQ(bytes_of(file.tensor("a")), a.bytes);
  EXPECT_EQ(bytes_of(file.tensor(b.name)), b.bytes);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.find("empty")->shape, Dims{0});
  EXPECT_THAT(list_folder(dir_.path()), ElementsAre("m.safetensors"));
}

TEST_F(SafetensorsWriterTest, AlignsEveryTensor) {
  SafetensorsWriter writer(path_, Entries{{"a", "I8", {3}}, {"b", "F32", {1}}, {"c", "BF16", {1}}, {"d", "I64", {1}}});
  writer.write("a", "abc", 3);
  writer.write("b", "abcd", 4);
  writer.write("c", "ab", 2);
  writer.write("d", "abcdefgh", 8);
  writer.finish();
  for (const auto& info : SafetensorsFile::open(path_).tensors()) {
    EXPECT_EQ(info.begin % size_bytes(*info.dtype), 0u) << info.name;
  }
}

TEST_F(SafetensorsWriterTest, NothingAppearsBeforeFinish) {
  {
    SafetensorsWriter writer(path_, Entries{{"a", "U8", {4}}});
    writer.write("a", "abcd", 4);
    EXPECT_FALSE(fs::exists(path_));
    EXPECT_EQ(list_folder(dir_.path()).size(), 1u);  // the temporary
  }
  EXPECT_TRUE(list_folder(dir_.path()).empty());
}

TEST_F(SafetensorsWriterTest, AbandonedOrIncompleteWriteLeavesTheOldFile) {
  write_file(path_, "old");
  {
    SafetensorsWriter writer(path_, Entries{{"a", "U8", {4}}});
    writer.write("a", "abc", 3);
    expect_error(ErrorCode::invalid_argument, {"`a`", "expected 4 bytes", "got 3"}, [&] { writer.finish(); });
  }
  EXPECT_EQ(read_file(path_), "old");
  EXPECT_THAT(list_folder(dir_.path()), ElementsAre("m.safetensors"));
}

TEST_F(SafetensorsWriterTest, RefusesBadDeclarationsAndWrites) {
  const auto declare = [&](const Entries& e) { SafetensorsWriter w(path_, e); };
  expect_error(ErrorCode::invalid_argument, {"`a`", "twice"}, [&] { declare({{"a", "U8", {1}}, {"a", "U8", {1}}}); });
  expect_error(ErrorCode::invalid_argument, {"`a`", "`U9`"}, [&] { declare({{"a", "U9", {1}}}); });
  expect_error(ErrorCode::invalid_argument, {"`a`", "[-1]"}, [&] { declare({{"a", "U8", {-1}}}); });
  expect_error(ErrorCode::invalid_argument, {"`a`"}, [&] { declare({{"a", "F64", {std::int64_t{1} << 61}}}); });
  expect_error(ErrorCode::invalid_argument, {"__metadata__"}, [&] { declare({{"__metadata__", "U8", {1}}}); });
  expect_error(ErrorCode::invalid_argument, {"UTF-8"}, [&] { declare({{"\xff", "U8", {1}}}); });
  EXPECT_TRUE(list_folder(dir_.path()).empty());
  SafetensorsWriter writer(path_, Entries{{"a", "U8", {2}}});
  expect_error(ErrorCode::invalid_argument, {"`b`", "declared"}, [&] { writer.write("b", "x", 1); });
  expect_error(ErrorCode::invalid_argument, {"`a`", "at most 2", "got 3"}, [&] { writer.write("a", "xyz", 3); });
}

TEST_F(SafetensorsWriterTest, FolderThatIsNotThere) {
  expect_error(ErrorCode::io, {"nowhere", "No such file"}, [&] {
    SafetensorsWriter w(dir_ / "nowhere/m.safetensors", Entries{{"a", "U8", {1}}});
  });
}

// RLIMIT_FSIZE makes the kernel refuse to grow a file, which is what a full disk does to pwrite.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &old_);
    handler_ = std::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{bytes, old_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit old_{};
  void (*handler_)(int);
};

TEST_F(SafetensorsWriterTest, FullDiskLeavesTheOldFileAndNoTemporary) {
  write_file(path_, "old");
  const std::string data(100000, 'x');
  {
    const FileSizeLimit limit(40000);
    expect_error(ErrorCode::io, {path_, "File too large"}, [&] {
      SafetensorsWriter writer(path_, Entries{{"a", "U8", {100000}}});
      writer.write("a", data.data(), data.size());
      writer.finish();
    });
  }
  EXPECT_EQ(read_file(path_), "old");
  EXPECT_THAT(list_folder(dir_.path()), ElementsAre("m.safetensors"));
}

TEST_F(SafetensorsWriterTest, FullDiskAtTheHeader) {
  {
    const FileSizeLimit limit(4);
    expect_error(ErrorCode::io, {path_}, [&] { SafetensorsWriter writer(path_, Entries{{"a", "U8", {1}}}); });
  }
  EXPECT_TRUE(list_folder(dir_.path()).empty());
}

TEST_F(SafetensorsWriterTest, TargetThatCannotBeReplaced) {
  fs::create_directories(path_ + "/inside");
  expect_error(ErrorCode::io, {path_}, [&] {
    SafetensorsWriter writer(path_, Entries{{"a", "U8", {1}}});
    writer.write("a", "x", 1);
    writer.finish();
  });
  EXPECT_THAT(list_folder(dir_.path()), ElementsAre("m.safetensors"));
}

}  // namespace
}  // namespace octomoe::test
