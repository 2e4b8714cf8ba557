#include "checkpoint/json_read.h"

#include <cmath>
#include <set>
#include <utility>

#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace {

// Bytes of the UTF-8 character that `text` starts with; 0 if it is malformed.
std::size_t utf8_length(std::string_view text) {
  const auto first = static_cast<unsigned char>(text[0]);
  const std::size_t length = first < 0x80   ? 1
                             : first < 0xc2 ? 0
                             : first < 0xe0 ? 2
                             : first < 0xf0 ? 3
                             : first < 0xf5 ? 4
                                            : 0;
  if (length > text.size()) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) return 0;
  }
  return length;
}

template <class Json>
Json parse(std::string_view text, const std::string& where) {
  std::vector<std::set<std::string>> keys;  // of every open object
  const auto watch = [&](int depth, typename Json::parse_event_t event, Json& value) {
    using Event = typename Json::parse_event_t;
    switch (event) {
      case Event::object_start:
      case Event::array_start:
        if (depth >= kMaxJsonDepth)
          fail(ErrorCode::format, "{}: expected JSON nested at most {} deep, got more", where, kMaxJsonDepth);
        if (event == Event::object_start) keys.emplace_back();
        break;
      case Event::object_end:
        keys.pop_back();
        break;
      case Event::key: {
        const auto& key = value.template get_ref<const std::string&>();
        if (!keys.back().insert(key).second) {
          fail(ErrorCode::format, "{}: expected every key once, got {} twice in one object", where, in_quotes(key));
        }
        break;
      }
      default:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& e) {
    std::string_view reason = e.what();  // "[json.exception.parse_error.101] parse error at ..."
    if (const std::size_t end = reason.find("] "); end != std::string_view::npos) reason.remove_prefix(end + 2);
    fail(ErrorCode::format, "{}: expected JSON, got {}", where, in_quotes(reason, 240));
  }
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  return parse<nlohmann::json>(text, where);
}

nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& where) {
  return parse<nlohmann::ordered_json>(text, where);
}

std::string in_quotes(std::string_view text, std::size_t most) {
  std::string out = "`";
  std::size_t i = 0;
  while (i < text.size() && i < most) {
    const std::size_t length = utf8_length(text.substr(i));
    const auto byte = static_cast<unsigned char>(text[i]);
    if (length == 0 || byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
      ++i;
    } else {
      out += text.substr(i, length);
      i += length;
    }
  }
  return out + (i < text.size() ? "...`" : "`");
}

std::string shown(const nlohmann::json& value) {
  constexpr std::size_t kShown = 120;
  const std::string text = value.dump(-1, ' ', true);  // ASCII, so that it can be cut anywhere
  return text.size() > kShown ? text.substr(0, kShown) + "..." : text;
}

JsonObject::JsonObject(const nlohmann::json& value, std::string where) : value_(&value), where_(std::move(where)) {
  if (!value.is_object()) fail(ErrorCode::format, "{}: expected a JSON object, got {}", where_, shown(value));
}

const nlohmann::json* JsonObject::find(const std::string& key) const {
  const auto it = value_->find(key);
  return it == value_->end() || it->is_null() ? nullptr : &*it;
}

void JsonObject::complain(ErrorCode code, const std::string& key, const std::string& expected) const {
  const nlohmann::json* got = find(key);
  fail(code, "{}: {}: expected {}, got {}", where_, key, expected, got ? shown(*got) : "nothing");
}
void JsonObject::wrong(const std::string& key, const std::string& expected) const {
  complain(ErrorCode::format, key, expected);
}
void JsonObject::unsupported(const std::string& key, const std::string& expected) const {
  complain(ErrorCode::unsupported, key, expected);
}
void JsonObject::missing(const std::string& key) const {
  fail(ErrorCode::format, "{}: {}: expected a value, got nothing", where_, key);
}

std::optional<JsonObject> JsonObject::object(const std::string& key) const {
  const nlohmann::json* v = find(key);
  if (!v) return std::nullopt;
  return JsonObject(*v, where_ + ": " + key);
}

std::optional<std::int64_t> JsonObject::integer(const std::string& key) const {
  const nlohmann::json* v = find(key);
  if (!v) return std::nullopt;
  if (!v->is_number_integer() || (v->is_number_unsigned() && v->get<std::uint64_t>() > INT64_MAX)) {
    wrong(key, "a whole number");
  }
  return v->get<std::int64_t>();
}

std::optional<double> JsonObject::number(const std::string& key) const {
  const nlohmann::json* v = find(key);
  if (!v) return std::nullopt;
  if (!v->is_number() || !std::isfinite(v->get<double>())) wrong(key, "a number");
  return v->get<double>();
}

std::optional<bool> JsonObject::boolean(const std::string& key) const {
  const nlohmann::json* v = find(key);
  if (!v) return std::nullopt;
  if (!v->is_boolean()) wrong(key, "true or false");
  return v->get<bool>();
}

std::optional<std::string> JsonObject::string(const std::string& key) const {
  const nlohmann::json* v = find(key);
  if (!v) return std::nullopt;
  if (!v->is_string()) wrong(key, "a string");
  return v->get<std::string>();
}

std::optional<std::vector<std::int64_t>> JsonObject::integers(const std::string& key) const {
  const nlohmann::json* v = find(key);
  if (!v) return std::nullopt;
  if (!v->is_array()) wrong(key, "a list of whole numbers");
  std::vector<std::int64_t> out;
  for (const auto& item : *v) {
    if (!item.is_number_integer() || (item.is_number_unsigned() && item.get<std::uint64_t>() > INT64_MAX)) {
      wrong(key, "a list of whole numbers");
    }
    out.push_back(item.get<std::int64_t>());
  }
  return out;
}

std::int64_t JsonObject::integer_in(const std::string& key, std::int64_t low, std::int64_t high,
                                    std::optional<std::int64_t> fallback) const {
  const std::optional<std::int64_t> v = integer(key);
  if (!v) {
    if (fallback) return *fallback;
    missing(key);
  }
  if (*v < low || *v > high) wrong(key, fmt::format("a number in {}..{}", low, high));
  return *v;
}

}  // namespace octomoe::checkpoint
