// JSON from files that nobody vouches for: size, nesting, duplicate keys, UTF-8 and types are checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "octomoe/error.h"

namespace octomoe::checkpoint {

inline constexpr int kMaxJsonDepth = 64;
inline constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;
inline constexpr std::size_t kMaxIndexBytes = std::size_t{256} << 20;

// `where` (a path) begins every message. Error(format) if the text is not one JSON value, nests deeper than
// kMaxJsonDepth, repeats a key inside one object or is not UTF-8.
nlohmann::json parse_json(std::string_view text, const std::string& where);
nlohmann::ordered_json parse_ordered_json(std::string_view text,
                                          const std::string& where);  // keeps the file's key order

// For messages: `text` in backquotes, control characters and malformed UTF-8 escaped, cut after about `most` bytes.
std::string in_quotes(std::string_view text, std::size_t most = 120);
// One line of JSON for messages, cut likewise.
std::string shown(const nlohmann::json& value);

// A JSON object and the place it came from. A key whose value is null counts as absent.
class JsonObject {
 public:
  JsonObject(const nlohmann::json& value, std::string where);  // Error(format) unless an object; keeps a reference

  const nlohmann::json* find(const std::string& key) const;
  std::optional<JsonObject> object(const std::string& key) const;
  std::optional<std::int64_t> integer(const std::string& key) const;  // Error unless a whole number that fits
  std::optional<double> number(const std::string& key) const;
  std::optional<bool> boolean(const std::string& key) const;
  std::optional<std::string> string(const std::string& key) const;
  std::optional<std::vector<std::int64_t>> integers(const std::string& key) const;

  // The same within [low, high]; Error(format) names key, range and value. `required` has no default.
  std::int64_t integer_in(const std::string& key, std::int64_t low, std::int64_t high,
                          std::optional<std::int64_t> fallback = std::nullopt) const;

  const std::string& where() const { return where_; }
  const nlohmann::json& value() const { return *value_; }
  [[noreturn]] void wrong(const std::string& key,
                          const std::string& expected) const;  // "WHERE: KEY: expected X, got Y"
  [[noreturn]] void missing(const std::string& key) const;
  [[noreturn]] void unsupported(const std::string& key, const std::string& expected) const;

 private:
  [[noreturn]] void complain(ErrorCode code, const std::string& key, const std::string& expected) const;
  const nlohmann::json* value_;
  std::string where_;
};

}  // namespace octomoe::checkpoint
