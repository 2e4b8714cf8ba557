// Little-endian fields, one after another: how packs and cache files are written and, distrusting every length, read.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "tensor/check.h"

namespace octomoe::jit {

static_assert(std::endian::native == std::endian::little, "packs are little-endian");

class ByteWriter {
 public:
  template <class T>
  requires(std::is_trivially_copyable_v<T>) void put(const T& value) {
    put_bytes({reinterpret_cast<const std::byte*>(&value), sizeof(T)});
  }
  void put_bytes(std::span<const std::byte> bytes) { out_.insert(out_.end(), bytes.begin(), bytes.end()); }
  void put_text(std::string_view text) {
    put(static_cast<std::uint32_t>(text.size()));
    put_bytes(std::as_bytes(std::span(text)));
  }
  std::vector<std::byte> take() { return std::move(out_); }
  std::size_t size() const { return out_.size(); }

 private:
  std::vector<std::byte> out_;
};

class ByteReader {
 public:
  ByteReader(std::span<const std::byte> bytes, const std::string& name) : rest_(bytes), name_(name) {}

  template <class T>
  requires(std::is_trivially_copyable_v<T>) T get() {
    T value;
    std::memcpy(&value, get_bytes(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::span<const std::byte> get_bytes(std::uint64_t count) {
    if (count > rest_.size()) {
      fail(ErrorCode::format, "{}: cut short: expected {} more bytes, got {}", name_, count, rest_.size());
    }
    const auto out = rest_.first(static_cast<std::size_t>(count));
    rest_ = rest_.subspan(static_cast<std::size_t>(count));
    return out;
  }
  std::string get_text() {
    const auto bytes = get_bytes(get<std::uint32_t>());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  std::size_t left() const { return rest_.size(); }
  const std::string& name() const { return name_; }

 private:
  std::span<const std::byte> rest_;
  const std::string& name_;
};

}  // namespace octomoe::jit
