// SafetensorsWriter: lays the file out, then takes the bytes in any order.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "checkpoint/file_io.h"
#include "checkpoint/json_read.h"
#include "checkpoint/safetensors_format.h"
#include "octomoe/checkpoint.h"
#include "tensor/check.h"

namespace octomoe {

using namespace checkpoint;

struct SafetensorsWriter::Impl {
  struct Slot {
    std::string name;
    std::uint64_t begin = 0, bytes = 0, written = 0;
  };
  explicit Impl(const std::string& p) : path(p), file(p) {}
  std::string path;
  AtomicFile file;
  std::vector<Slot> slots;
  std::unordered_map<std::string, std::size_t> by_name;
  bool finished = false;
};

namespace {

struct Layout {
  std::string header;                       // with its length and padding
  std::vector<std::uint64_t> begin, bytes;  // by entry, begin from the start of the file
};

// Wide types first, as the reference writer does, so that each tensor is aligned to its element.
Layout lay_out(const std::string& path, const std::vector<SafetensorsWriter::Entry>& entries,
               const std::map<std::string, std::string>& metadata) {
  const auto where = [&](const std::string& name) { return path + ": tensor " + in_quotes(name); };
  Layout layout;
  std::vector<std::size_t> order(entries.size());
  std::vector<int> bits(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const auto& e = entries[i];
    const FileDType* dtype = find_dtype(e.dtype_name);
    if (!dtype)
      bad_argument("{}: expected a type of the safetensors format, got {}", where(e.name), in_quotes(e.dtype_name));
    if (e.name == kMetadataKey) bad_argument("{}: expected another name", where(e.name));
    const auto bytes = tensor_bytes(*dtype, e.shape);
    if (!bytes) bad_argument("{}: expected a shape of whole bytes, got {}", where(e.name), shape_text(e.shape));
    order[i] = i;
    bits[i] = dtype->bits;
    layout.bytes.push_back(*bytes);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return bits[a] > bits[b]; });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  layout.begin.resize(entries.size());
  std::uint64_t at = 0;
  for (const std::size_t i : order) {
    const auto& e = entries[i];
    std::uint64_t end = 0;
    if (__builtin_add_overflow(at, layout.bytes[i], &end) || end > INT64_MAX)
      bad_argument("{}: expected less than 2^63 bytes in all", where(e.name));
    layout.begin[i] = at;
    header[e.name] = {{"dtype", e.dtype_name}, {"shape", e.shape}, {"data_offsets", {at, end}}};
    at = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& e) {
    bad_argument("{}: expected tensor names and metadata in UTF-8, got {}", path, in_quotes(e.what()));
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kMaxHeaderBytes)
    bad_argument("{}: expected a header of at most {} bytes, got {}", path, kMaxHeaderBytes, text.size());
  const std::uint64_t length = text.size();
  layout.header.assign(reinterpret_cast<const char*>(&length), 8);
  layout.header += text;
  for (std::uint64_t& b : layout.begin) b += layout.header.size();
  return layout;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                                     std::map<std::string, std::string> metadata) {
  std::unordered_map<std::string, std::size_t> by_name;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (!by_name.emplace(entries[i].name, i).second) {
      bad_argument("{}: tensor {}: expected every name once, got it twice", path, in_quotes(entries[i].name));
    }
  }
  const Layout layout = lay_out(path, entries, metadata);
  impl_ = std::make_unique<Impl>(path);
  impl_->by_name = std::move(by_name);
  for (std::size_t i = 0; i < entries.size(); ++i) {
    impl_->slots.push_back({std::move(entries[i].name), layout.begin[i], layout.bytes[i], 0});
  }
  impl_->file.write_at(0, layout.header.data(), layout.header.size());
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const std::string& name, const void* data, std::size_t bytes) {
  const auto it = impl_->by_name.find(name);
  if (it == impl_->by_name.end()) bad_argument("{}: tensor {}: expected a declared name", impl_->path, in_quotes(name));
  Impl::Slot& slot = impl_->slots[it->second];
  if (bytes > slot.bytes - slot.written) {
    bad_argument("{}: tensor {}: expected at most {} more bytes, got {}", impl_->path, in_quotes(name),
                 slot.bytes - slot.written, bytes);
  }
  impl_->file.write_at(slot.begin + slot.written, data, bytes);
  slot.written += bytes;
}

void SafetensorsWriter::finish() {
  if (impl_->finished) bad_argument("{}: finish: expected one call, got a second", impl_->path);
  for (const auto& slot : impl_->slots) {
    if (slot.written != slot.bytes) {
      bad_argument("{}: tensor {}: expected {} bytes to be written, got {}", impl_->path, in_quotes(slot.name),
                   slot.bytes, slot.written);
    }
  }
  impl_->file.commit();
  impl_->finished = true;
}

}  // namespace octomoe
