// Hostile and honest files for SafetensorsFile.
#include "checkpoint/test_files.h"

namespace octomoe::test {
namespace {

using testing::ElementsAre;

class SafetensorsFileTest : public testing::Test {
 protected:
  SafetensorsFile open(const std::string& bytes) {
    write_file(path_, bytes);
    return SafetensorsFile::open(path_);
  }
  // Refused, and the message names the file.
  void refused(const std::string& bytes, const std::vector<std::string>& parts) {
    std::vector<std::string> all = parts;
    all.push_back(path_);
    expect_error(ErrorCode::format, all, [&] { open(bytes); });
  }
  static std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
  }
  static std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"t":)" + entry(dtype, shape, offsets) + "}";
  }

  TempDir dir_;
  std::string path_ = dir_ / "m.safetensors";
};

TEST_F(SafetensorsFileTest, ReadsTensorsWhereTheyLie) {
  const auto a = float_tensor("a", "BF16", {2, 3});
  const auto b = float_tensor("b", "F32", {});
  const auto c = RawTensor{"c", "I64", {0, 4}, ""};
  const SafetensorsFile file = open(safetensors_bytes({b, a, c}));
  ASSERT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(file.tensors()[0].name, "b");  // in the order of their bytes
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.path(), path_);
  EXPECT_EQ(file.find("none"), nullptr);
  const Tensor t = file.tensor("a");
  EXPECT_EQ(t.dtype(), DType::bfloat16);
  EXPECT_THAT(dims_of(t), ElementsAre(2, 3));
  EXPECT_EQ(bytes_of(t), a.bytes);
  EXPECT_EQ(bytes_of(file.tensor("b")), b.bytes);
  EXPECT_EQ(file.tensor("c").elems(), 0);
}

TEST_F(SafetensorsFileTest, TensorOutlivesTheFileObject) {
  const auto a = float_tensor("a", "F32", {1000});
  Tensor t;
  {
    t = open(safetensors_bytes({a})).tensor("a");
    fs::remove(path_);
  }
  EXPECT_EQ(bytes_of(t), a.bytes);
}

TEST_F(SafetensorsFileTest, MisalignedTensorIsCopiedToAlignedMemory) {
  const auto a = int_tensor("a", "I8", {3}, -5, 5);
  const auto b = float_tensor("b", "F32", {7});
  const Tensor t = open(safetensors_bytes({a, b})).tensor("b");
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.view().data()) % 4, 0u);
  EXPECT_EQ(bytes_of(t), b.bytes);
}

TEST_F(SafetensorsFileTest, ListsTypesItCannotComputeWith) {
  const SafetensorsFile file =
      open(safetensors_bytes({{"b", "BOOL", {3}, std::string("\1\0\1", 3)}, {"f4", "F4", {2, 3}, "abc"}}));
  EXPECT_FALSE(file.find("b")->dtype.has_value());
  EXPECT_EQ(file.bytes("f4").size(), 3u);
  expect_error(ErrorCode::unsupported, {"`b`", "BOOL", path_}, [&] { static_cast<void>(file.tensor("b")); });
  expect_error(ErrorCode::format, {"`nope`", path_}, [&] { static_cast<void>(file.tensor("nope")); });
}

TEST_F(SafetensorsFileTest, RefusesTooManyDimensionsOnlyAsTensor) {
  const SafetensorsFile file = open(safetensors_bytes({{"d", "U8", {1, 1, 1, 1, 1, 2}, "ab"}}));
  EXPECT_EQ(file.bytes("d").size(), 2u);
  expect_error(ErrorCode::unsupported, {"[1, 1, 1, 1, 1, 2]", "5"}, [&] { static_cast<void>(file.tensor("d")); });
}

TEST_F(SafetensorsFileTest, AcceptsHeaderPaddedWithSpacesAndEmptyFile) {
  EXPECT_EQ(open(raw_file("{}      ")).tensors().size(), 0u);
  EXPECT_EQ(open(raw_file(one("U8", "[2]", "[0,2]") + "   ", "ab")).tensors().size(), 1u);
}

TEST_F(SafetensorsFileTest, MissingFileFolderAndDevice) {
  expect_error(ErrorCode::io, {"none.safetensors", "No such file"},
               [&] { SafetensorsFile::open(dir_ / "none.safetensors"); });
  expect_error(ErrorCode::io, {dir_.path(), "regular file"}, [&] { SafetensorsFile::open(dir_.path()); });
  expect_error(ErrorCode::io, {"/dev/zero", "regular file"}, [&] { SafetensorsFile::open("/dev/zero"); });
}

TEST_F(SafetensorsFileTest, TruncatedBeforeTheHeader) {
  refused("", {"8 bytes", "got 0"});
  refused("1234567", {"8 bytes", "got 7"});
}

TEST_F(SafetensorsFileTest, HeaderLength) {
  refused(raw_file("{}", "", 0), {"header length", "got 0"});
  refused(raw_file("{}", "", 1), {"got 1"});
  refused(raw_file("{}", "", 3), {"2..2", "got 3"});
  refused(raw_file("{}", "", std::uint64_t{1} << 63), {"got 9223372036854775808"});
  refused(raw_file("{}", "", ~std::uint64_t{0}), {"got 18446744073709551615"});
  refused(raw_file("{}", "", ~std::uint64_t{0} - 7), {"header length"});
}

TEST_F(SafetensorsFileTest, HugeHeaderIsRefusedBeforeItIsRead) {
  write_file(path_, raw_file("", "", 200'000'000));
  fs::resize_file(path_, 300'000'000);  // sparse
  expect_error(ErrorCode::format, {"100000000", "got 200000000"}, [&] { SafetensorsFile::open(path_); });
}

TEST_F(SafetensorsFileTest, NotJson) {
  refused(raw_file("[]"), {"starts with"});
  refused(raw_file("  {}"), {"starts with"});
  refused(raw_file("{\"a\":"), {"expected JSON"});
  refused(raw_file("{} {}"), {"expected JSON"});
  refused(raw_file("{\"\xff\xfe\":{}}"), {"expected JSON", "UTF-8"});
  refused(raw_file("{\"t\":{\"dtype\":\"\xc3\x28\"}}"), {"UTF-8"});
  refused(raw_file("{\"t\":1e999}"), {"expected JSON"});
}

TEST_F(SafetensorsFileTest, DeepNesting) {
  const std::string deep = std::string("{\"t\":") + std::string(100000, '[') + std::string(100000, ']') + "}";
  refused(raw_file(deep), {"nested", "64"});
}

TEST_F(SafetensorsFileTest, DuplicateKeys) {
  const std::string t = entry("U8", "[1]", "[0,1]");
  refused(raw_file("{\"t\":" + t + ",\"t\":" + t + "}", "a"), {"`t` twice"});
  refused(raw_file(R"({"t":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", "a"), {"`dtype` twice"});
}

TEST_F(SafetensorsFileTest, MalformedEntries) {
  refused(raw_file(R"({"t":3})"), {"`t`", "JSON object"});
  refused(raw_file(R"({"t":{}})"), {"`t`", "dtype"});
  refused(raw_file(R"({"t":{"dtype":"U8"}})"), {"`t`", "shape"});
  refused(raw_file(R"({"t":{"dtype":"U8","shape":[]}})"), {"`t`", "data_offsets"});
  refused(raw_file(one("U9", "[1]", "[0,1]"), "a"), {"`t`", "dtype", "U9"});
  refused(raw_file(R"({"t":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})", "a"), {"dtype", "a string", "got 8"});
  refused(raw_file(one("U8", "3", "[0,1]"), "a"), {"shape", "whole numbers"});
  refused(raw_file(one("U8", "[1.0]", "[0,1]"), "a"), {"shape", "whole numbers"});
  refused(raw_file(one("U8", "[18446744073709551615]", "[0,1]"), "a"), {"shape", "whole numbers"});
  refused(raw_file(one("U8", "[-1]", "[0,1]"), "a"), {"shape", "got [-1]"});
  refused(raw_file(one("U8", "[-1,-1]", "[0,1]"), "a"), {"shape", "got [-1,-1]"});
  refused(raw_file(one("F4", "[3]", "[0,1]"), "a"), {"shape", "whole bytes"});
  refused(raw_file(R"({"__metadata__":{"a":1}})"), {"__metadata__", "a string"});
  refused(raw_file(R"({"__metadata__":[]})"), {"__metadata__", "JSON object"});
}

TEST_F(SafetensorsFileTest, ShapeOverflow) {
  refused(raw_file(one("U8", "[4294967296,4294967296]", "[0,0]")), {"shape", "4294967296"});
  refused(raw_file(one("F64", "[9223372036854775807]", "[0,8]"), "12345678"), {"shape"});
  // 2^61 elements of 8 bytes: the product of bits wraps to 0.
  refused(raw_file(one("F64", "[2305843009213693952]", "[0,0]")), {"shape"});
  // An empty dimension does not excuse the others.
  refused(raw_file(one("U8", "[0,4294967296,4294967296]", "[0,0]")), {"shape"});
  refused(raw_file(one("U8", "[0,-1]", "[0,0]")), {"shape"});
}

TEST_F(SafetensorsFileTest, Offsets) {
  refused(raw_file(one("U8", "[2]", "[0]"), "ab"), {"data_offsets"});
  refused(raw_file(one("U8", "[2]", "[0,1,2]"), "ab"), {"data_offsets"});
  refused(raw_file(one("U8", "[2]", "[-2,0]"), "ab"), {"data_offsets", "got [-2,0]"});
  refused(raw_file(one("U8", "[2]", "[2,0]"), "ab"), {"data_offsets", "begin <= end"});
  refused(raw_file(one("U8", "[2]", "[0,1]"), "ab"), {"2 bytes for U8 [2]", "got [0,1]"});
  refused(raw_file(one("U8", "[2]", "[9223372036854775805,9223372036854775807]"), "ab"), {"within the 2 bytes"});
}

TEST_F(SafetensorsFileTest, TruncatedAndOversizedData) {
  refused(raw_file(one("U8", "[4]", "[0,4]"), "abc"), {"`t`", "within the 3 bytes", "[0,4]"});
  refused(raw_file(one("U8", "[4]", "[0,4]"), "abcde"), {"expected 4 bytes of data", "got 5"});
  refused(raw_file("{}", "x"), {"expected 0 bytes", "got 1"});
}

TEST_F(SafetensorsFileTest, OverlapAndGap) {
  const auto two = [&](const std::string& a, const std::string& b) {
    return "{\"a\":" + entry("U8", "[2]", a) + ",\"b\":" + entry("U8", "[2]", b) + "}";
  };
  EXPECT_EQ(open(raw_file(two("[2,4]", "[0,2]"), "abcd")).tensors()[0].name, "b");
  refused(raw_file(two("[0,2]", "[1,3]"), "abc"), {"`b`", "overlaps", "offset 2, got 1"});
  refused(raw_file(two("[0,2]", "[0,2]"), "ab"), {"overlaps"});
  refused(raw_file(two("[0,2]", "[3,5]"), "abcde"), {"`b`", "gap", "offset 2, got 3"});
  refused(raw_file(one("U8", "[1]", "[1,2]"), "ab"), {"`t`", "gap"});
}

TEST_F(SafetensorsFileTest, LongAndBinaryNamesStayReadableInMessages) {
  const std::string name(5000, 'n');
  try {
    open(raw_file("{\"" + name + "\\u0001\":3}"));
    FAIL();
  } catch (const Error& e) {
    EXPECT_LT(std::strlen(e.what()), 500u);
  }
  refused(raw_file("{\"a\\u0001b\":3}"), {"`a\\x01b`"});
}

// Every prefix of a good file and every single-byte change either opens or is refused; none crashes.
TEST_F(SafetensorsFileTest, DamagedAnywhere) {
  const std::string good = safetensors_bytes({float_tensor("a", "BF16", {2, 3}), float_tensor("b", "F32", {2})});
  const auto attempt = [&](const std::string& bytes) {
    try {
      const SafetensorsFile file = open(bytes);
      for (const auto& info : file.tensors()) {
        std::uint64_t sum = 0;
        for (const std::byte b : file.bytes(info.name)) sum += static_cast<std::uint64_t>(b);
        EXPECT_LE(sum, info.end * 255);
      }
      return true;
    } catch (const Error&) {
      return false;
    }
  };
  for (std::size_t n = 0; n < good.size(); ++n) EXPECT_FALSE(attempt(good.substr(0, n))) << n;
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const int flip : {1, 0x80, 0xff}) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ flip);
      attempt(bad);
    }
  }
  EXPECT_TRUE(attempt(good));
}

}  // namespace
}  // namespace octomoe::test
