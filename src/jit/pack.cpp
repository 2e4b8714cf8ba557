#include "jit/pack.h"

#include <zstd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "checkpoint/file_io.h"
#include "jit/bytes.h"
#include "tensor/check.h"

namespace octomoe::jit {
namespace {

constexpr std::array<char, 8> kMagic = {'O', 'C', 'T', 'O', 'P', 'A', 'C', 'K'};
constexpr std::size_t kSumOffset = 32, kHeaderBytes = 48;
// 19 against 3: a seventh smaller, and packs are written once.
constexpr int kZstdLevel = 19;
// No image comes near it: what a damaged or hostile length may make us allocate.
constexpr std::uint64_t kMostImageBytes = std::uint64_t{256} << 20;

Key header_sum(std::span<const std::byte> header, std::span<const std::byte> index) {
  std::vector<std::byte> all(header.begin(), header.begin() + kSumOffset);
  all.insert(all.end(), index.begin(), index.end());
  return hash(all);
}

std::vector<std::byte> compress(std::span<const std::byte> raw) {
  std::vector<std::byte> out(ZSTD_compressBound(raw.size()));
  const std::size_t n = ZSTD_compress(out.data(), out.size(), raw.data(), raw.size(), kZstdLevel);
  if (ZSTD_isError(n)) fail(ErrorCode::internal, "zstd: {}", ZSTD_getErrorName(n));
  out.resize(n);
  return out;
}

void put_entry(ByteWriter& out, const PackEntry& e) {
  out.put_text(e.id);
  out.put_text(e.expect);
  out.put(static_cast<std::int32_t>(e.target.arch));
  out.put(static_cast<std::int32_t>(e.target.ptx));
  out.put(e.source_key.bytes);
  const ResourceReport& r = e.report;
  for (const int value : {e.nvrtc_version, e.threads, e.shared_bytes, r.registers, r.stack_bytes, r.spill_store_bytes,
                          r.spill_load_bytes, r.static_shared_bytes, r.tensor_instructions}) {
    out.put(static_cast<std::int32_t>(value));
  }
  out.put(static_cast<std::uint32_t>(r.warnings.size()));
  for (const std::string& w : r.warnings) out.put_text(w);
  out.put(e.offset);
  out.put(e.stored_bytes);
  out.put(e.raw_bytes);
  out.put(e.checksum.bytes);
}

PackEntry get_entry(ByteReader& in) {
  PackEntry e;
  e.id = in.get_text();
  e.expect = in.get_text();
  e.target.arch = in.get<std::int32_t>();
  e.target.ptx = in.get<std::int32_t>() != 0;
  e.source_key.bytes = in.get<std::array<std::uint8_t, 16>>();
  ResourceReport& r = e.report;
  for (int* value : {&e.nvrtc_version, &e.threads, &e.shared_bytes, &r.registers, &r.stack_bytes, &r.spill_store_bytes,
                     &r.spill_load_bytes, &r.static_shared_bytes, &r.tensor_instructions}) {
    *value = in.get<std::int32_t>();
  }
  const auto warnings = in.get<std::uint32_t>();
  for (std::uint32_t i = 0; i < warnings; ++i) r.warnings.push_back(in.get_text());
  e.offset = in.get<std::uint64_t>();
  e.stored_bytes = in.get<std::uint64_t>();
  e.raw_bytes = in.get<std::uint64_t>();
  e.checksum.bytes = in.get<std::array<std::uint8_t, 16>>();
  return e;
}

}  // namespace

std::vector<std::byte> make_pack(std::span<const PackItem> items) {
  std::vector<const PackItem*> sorted;
  for (const PackItem& item : items) sorted.push_back(&item);
  std::sort(sorted.begin(), sorted.end(), [](const PackItem* a, const PackItem* b) {
    return std::pair(a->kernel.target, a->kernel.id) < std::pair(b->kernel.target, b->kernel.id);
  });

  std::vector<PackEntry> entries;
  std::vector<std::vector<std::byte>> images;
  for (const PackItem* item : sorted) {
    const CompiledKernel& k = item->kernel;
    images.push_back(compress(k.image));
    entries.push_back({.id = k.id,
                       .expect = item->entry.expect,
                       .target = k.target,
                       .source_key = k.source_key,
                       .nvrtc_version = k.nvrtc_version,
                       .threads = item->entry.threads,
                       .shared_bytes = item->entry.shared_bytes,
                       .report = k.report,
                       .offset = 0,
                       .stored_bytes = images.back().size(),
                       .raw_bytes = k.image.size(),
                       .checksum = hash(images.back())});
  }
  const auto write_index = [&] {
    ByteWriter index;
    for (const PackEntry& e : entries) put_entry(index, e);
    return index.take();
  };
  const std::uint64_t index_bytes = write_index().size();  // offsets have a fixed width
  std::uint64_t at = kHeaderBytes + index_bytes;
  for (PackEntry& e : entries) {
    e.offset = at;
    at += e.stored_bytes;
  }
  const std::vector<std::byte> index = write_index();

  ByteWriter out;
  out.put(kMagic);
  out.put(kPackVersion);
  out.put(static_cast<std::uint32_t>(entries.size()));
  out.put(at);
  out.put(index_bytes);
  std::vector<std::byte> file = out.take();
  const Key sum = header_sum(file, index);
  const auto append = [&](std::span<const std::byte> bytes) { file.insert(file.end(), bytes.begin(), bytes.end()); };
  append(std::as_bytes(std::span(sum.bytes)));
  append(index);
  for (const auto& image : images) append(image);
  return file;
}

std::shared_ptr<const Pack> Pack::open(const std::string& path) {
  auto file = checkpoint::MappedFile::open(path);
  return parse(file->bytes(), path, file);
}

std::shared_ptr<const Pack> Pack::parse(std::span<const std::byte> file, std::string name,
                                        std::shared_ptr<const void> owner) {
  std::shared_ptr<Pack> pack(new Pack);
  pack->name_ = std::move(name);
  pack->file_ = file;
  pack->owner_ = std::move(owner);
  ByteReader in(file, pack->name_);
  const auto refuse = [&]<class... Args>(fmt::format_string<Args...> format, Args&&... args) {
    fail(ErrorCode::format, "{}: {}", pack->name_, fmt::format(format, std::forward<Args>(args)...));
  };
  if (file.size() < kMagic.size() || in.get<std::array<char, 8>>() != kMagic) refuse("not a kernel pack");
  const auto version = in.get<std::uint32_t>();
  if (version != kPackVersion) refuse("expected a kernel pack of version {}, got version {}", kPackVersion, version);
  const auto count = in.get<std::uint32_t>();
  const auto file_bytes = in.get<std::uint64_t>();
  const auto index_bytes = in.get<std::uint64_t>();
  if (file_bytes > file.size()) refuse("cut short: expected {} bytes, got {}", file_bytes, file.size());
  if (file_bytes < file.size()) refuse("{} bytes follow the end of the pack", file.size() - file_bytes);
  Key sum;
  sum.bytes = in.get<std::array<std::uint8_t, 16>>();
  const auto index = in.get_bytes(index_bytes);
  if (header_sum(file.first(kSumOffset), index) != sum) refuse("damaged: the checksum of its index does not match");

  ByteReader rows(index, pack->name_);
  const std::uint64_t images_begin = kHeaderBytes + index_bytes;
  for (std::uint32_t i = 0; i < count; ++i) {
    PackEntry e = get_entry(rows);
    if (e.offset < images_begin || e.offset > file_bytes || e.stored_bytes > file_bytes - e.offset ||
        e.raw_bytes > kMostImageBytes) {
      refuse("entry {}: image out of bounds: {} bytes at {} of {}", e.id, e.stored_bytes, e.offset, file_bytes);
    }
    pack->by_key_.emplace(std::pair(e.source_key, e.target), pack->entries_.size());
    pack->entries_.push_back(std::move(e));
  }
  if (rows.left() > 0) refuse("{} bytes too many in its index", rows.left());
  return pack;
}

const PackEntry* Pack::find(const Key& source_key, Target target) const {
  const auto it = by_key_.find({source_key, target});
  return it == by_key_.end() ? nullptr : &entries_[it->second];
}

std::vector<std::byte> Pack::image(const PackEntry& e) const {
  const auto stored = file_.subspan(e.offset, e.stored_bytes);
  if (hash(stored) != e.checksum) {
    fail(ErrorCode::format, "{}: kernel {} for {} is damaged: its checksum does not match", name_, e.id,
         to_string(e.target));
  }
  std::vector<std::byte> raw(e.raw_bytes);
  const std::size_t n = ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size());
  if (ZSTD_isError(n) || n != raw.size()) {
    fail(ErrorCode::format, "{}: kernel {} for {} does not decompress: {}", name_, e.id, to_string(e.target),
         ZSTD_isError(n) ? ZSTD_getErrorName(n) : "wrong length");
  }
  return raw;
}

CompiledKernel Pack::kernel(const PackEntry& e) const {
  return {.id = e.id,
          .target = e.target,
          .source_key = e.source_key,
          .nvrtc_version = e.nvrtc_version,
          .report = e.report,
          .image = image(e)};
}

}  // namespace octomoe::jit
