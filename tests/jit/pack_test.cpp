#include "jit/pack.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cstring>

#include "jit/support.h"
#include "support/errors.h"

namespace octomoe::jit {
namespace {

using octomoe::testing::expect_error;
using testing::made_up_kernel;
using testing::TempFolder;

std::vector<PackItem> items() {
  std::vector<PackItem> out;
  for (const auto& [id, target, bytes] : {std::tuple("gemm:a", Target(80), 5000),
                                          {"gemm:b", Target(90), 300},
                                          {"gemm:a", Target(90), 7000},
                                          {"gemm:c", Target(90, true), 1}}) {
    PackItem item{made_up_kernel(id, target, static_cast<std::size_t>(bytes)), {}};
    item.entry.expect = "IMMA";
    item.entry.threads = 256;
    item.entry.shared_bytes = 65536;
    out.push_back(std::move(item));
  }
  return out;
}

std::shared_ptr<const Pack> parse(const std::vector<std::byte>& bytes) { return Pack::parse(bytes, "p"); }

TEST(Pack, RoundTrip) {
  const auto all = items();
  const std::vector<std::byte> bytes = make_pack(all);
  const auto pack = parse(bytes);
  ASSERT_EQ(pack->entries().size(), all.size());
  for (const PackItem& item : all) {
    const PackEntry* e = pack->find(item.kernel.source_key, item.kernel.target);
    ASSERT_NE(e, nullptr);
    EXPECT_EQ(e->id, item.kernel.id);
    EXPECT_EQ(e->expect, "IMMA");
    EXPECT_EQ(e->threads, 256);
    EXPECT_EQ(e->shared_bytes, 65536);
    EXPECT_EQ(e->report, item.kernel.report);
    EXPECT_EQ(pack->image(*e), item.kernel.image);
    EXPECT_EQ(pack->kernel(*e).nvrtc_version, item.kernel.nvrtc_version);
  }
  EXPECT_EQ(pack->find(all[0].kernel.source_key, 86), nullptr);
  EXPECT_EQ(pack->find(Key{}, 80), nullptr);
}

TEST(Pack, DoesNotDependOnTheOrderOfItems) {
  auto all = items();
  const auto bytes = make_pack(all);
  std::reverse(all.begin(), all.end());
  EXPECT_EQ(make_pack(all), bytes);
}

TEST(Pack, Empty) {
  const auto bytes = make_pack({});
  EXPECT_TRUE(parse(bytes)->entries().empty());
}

TEST(Pack, FilesAreMapped) {
  TempFolder folder;
  const auto bytes = make_pack(items());
  testing::write_file(folder.path("k.pack"), std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  const auto pack = Pack::open(folder.path("k.pack"));
  std::filesystem::remove(folder.path("k.pack"));  // the map stays
  EXPECT_EQ(pack->image(pack->entries()[0]).size(), 5000u);
  expect_error(ErrorCode::io, "cannot open", [&] { Pack::open(folder.path("none.pack")); });
  testing::write_file(folder.path("empty.pack"), "");
  expect_error(ErrorCode::format, "empty.pack: not a kernel pack", [&] { Pack::open(folder.path("empty.pack")); });
}

TEST(Pack, ForeignFilesAndOtherVersionsAreRefused) {
  auto bytes = make_pack(items());
  auto foreign = bytes;
  foreign[0] = std::byte{'X'};
  expect_error(ErrorCode::format, "p: not a kernel pack", [&] { parse(foreign); });
  auto other = bytes;
  other[8] = std::byte{kPackVersion + 1};
  expect_error(ErrorCode::format, "p: expected a kernel pack of version 1, got version 2", [&] { parse(other); });
}

TEST(Pack, EveryTruncationIsRefused) {
  const auto bytes = make_pack(items());
  for (std::size_t n = 0; n < bytes.size(); n += n < 600 ? 1 : 97) {
    const std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
    expect_error(ErrorCode::format, n < 8 ? "not a kernel pack" : "cut short", [&] { parse(cut); });
  }
  auto longer = bytes;
  longer.push_back(std::byte{1});
  expect_error(ErrorCode::format, "1 bytes follow the end", [&] { parse(longer); });
}

TEST(Pack, EveryFlippedBitIsFound) {
  const auto bytes = make_pack(items());
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    auto flipped = bytes;
    flipped[i] ^= static_cast<std::byte>(1u << (i % 8));
    expect_error(ErrorCode::format, "p: ", [&] {
      const auto pack = parse(flipped);
      for (const PackEntry& e : pack->entries()) pack->image(e);
    });
  }
}

}  // namespace
}  // namespace octomoe::jit
